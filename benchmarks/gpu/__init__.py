# SPDX-License-Identifier: Apache-2.0
"""All measurements that need a GPU, without network access: ``python -m benchmarks.gpu``."""
