# SPDX-License-Identifier: Apache-2.0
"""Device operations, one a file. The torch functions here are the reference: they specify
what faster implementations (Triton in ``kernels/``, C++ in ``csrc/``) must compute."""
