# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the device operations, importable as ``vl_cache_vllm.kernels``.

Each file here will hold the Triton version of the operation of the same name in
``vl_cache_vllm.ops``, whose torch function is the specification. None is there yet: this
release runs the torch operations (see docs/gpu-validation.md).
"""
