# SPDX-License-Identifier: Apache-2.0
"""What a GPU machine is asked, without a network: ``python -m benchmarks.gpu``."""
