# SPDX-License-Identifier: Apache-2.0
"""Tests of operations with several implementations run on each of them."""

from collections.abc import Iterator

import pytest

from vl_cache_vllm.ops import native


@pytest.fixture(params=["torch", "cpp"], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp" and not native.is_built():
        pytest.skip("the C++ operators have not been built")
    with native.use(request.param == "cpp"):
        yield request.param
