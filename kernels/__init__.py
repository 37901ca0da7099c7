# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the device operations, installed as ``vl_cache_vllm.kernels``.

Each file implements the operation of the same name in ``vl_cache_vllm.ops``. The torch function
there is the specification, and `vl_cache_vllm.ops.dispatch` chooses the implementation. A file has
one or two kernels and, below them, a launcher with the name and the arguments of the operation.

Every kernel argument has a comment with its shape, type and unit. A tensor argument is a pointer to
the first element; strides are in elements unless the comment says otherwise. Arguments in capitals
are compile-time constants. ``do_not_specialize`` lists the integers that differ between prompts or
batches, so that Triton compiles each kernel once for all of them.

GPU validation status: see docs/gpu-validation.md.
"""
