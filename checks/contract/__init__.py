# SPDX-License-Identifier: Apache-2.0
"""The contract: what this package relies on in vLLM, checked against vLLM's sources."""
