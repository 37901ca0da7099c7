# SPDX-License-Identifier: Apache-2.0
"""What a GPU must answer, in three calls of a few minutes: ``python -m benchmarks.gpu``."""
