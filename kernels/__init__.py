# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the device operations, importable as ``vl_cache_vllm.kernels``.

Each file holds the Triton version of the operation of the same name in ``vl_cache_vllm.ops``,
whose torch function is the specification; `vl_cache_vllm.ops.dispatch` decides who serves. They
run through Triton's interpreter and are compiled for sm_80, sm_90 and sm_100 in the tests, but have
not yet met a GPU (docs/gpu-validation.md).
"""
