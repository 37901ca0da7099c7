# SPDX-License-Identifier: Apache-2.0
"""``vl-cache-inspect``: one request, and a picture and a page of what its cache kept."""
