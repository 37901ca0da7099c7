# SPDX-License-Identifier: Apache-2.0
"""Package layout and C++ operators. Metadata lives in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

flags = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# A plain C library, loaded with ctypes: no Python or torch headers, any torch. Optional: without a
# compiler the installation goes on, and the torch operations serve.
operators = Extension(
    "vl_cache_vllm._native",
    sorted(map(str, Path("csrc").glob("*.cpp"))),
    depends=sorted(map(str, Path("csrc").glob("*.h"))),
    extra_compile_args=flags,
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    packages=[*find_packages(include=["vl_cache_vllm*"]), "vl_cache_vllm.kernels"],
    # The Triton kernels stand at the top level of the repository, beside csrc/.
    package_dir={"vl_cache_vllm.kernels": "kernels"},
    ext_modules=[operators],
)
