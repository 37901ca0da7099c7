# SPDX-License-Identifier: Apache-2.0
"""What we rely on of vLLM, checked against its sources."""
