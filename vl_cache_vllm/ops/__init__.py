# SPDX-License-Identifier: Apache-2.0
"""Device operations of an eviction, one per file.

Each operation is a torch function with the decorator `dispatch.operation`. The torch function is
the specification: C++ (``csrc/``) and Triton (``kernels/``) must compute the same. The tests in
``tests/ops`` compare every implementation with a loop in plain Python.
"""
