# SPDX-License-Identifier: Apache-2.0
"""Tests of operations with several implementations run on each of them.

Triton's run through its interpreter, in the second run of ``make test``.
"""

from collections.abc import Iterator

import pytest

from tests.helpers.pools import PACKINGS
from vl_cache_vllm.ops import dispatch, native

TRITON = pytest.param("triton", marks=pytest.mark.interpreter)


@pytest.fixture(params=["torch", "cpp", TRITON], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp" and not native.is_built():
        pytest.skip("the C++ operators have not been built")
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture(params=PACKINGS)
def packing(request: pytest.FixtureRequest, implementation: str) -> str:
    if implementation == "triton" and request.param == "random":
        pytest.skip("on a GPU, tokens lie at regular strides in a page")
    if implementation == "cpp" and request.param == "interleaved":
        pytest.skip("on a CPU, a head's tokens lie together")
    return request.param
