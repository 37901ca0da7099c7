# SPDX-License-Identifier: Apache-2.0
"""Package layout. Metadata lives in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', Path("vl_cache_vllm/__init__.py").read_text())
assert version is not None

setup(
    version=version[1],
    packages=[*find_packages(include=["vl_cache_vllm*"]), "vl_cache_vllm.kernels"],
    # The Triton kernels stand at the top level of the repository, beside csrc/.
    package_dir={"vl_cache_vllm.kernels": "kernels"},
)
