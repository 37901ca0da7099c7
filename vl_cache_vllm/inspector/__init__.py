# SPDX-License-Identifier: Apache-2.0
"""``vl-cache-inspect``: run one request and show which tokens its KV cache kept."""
