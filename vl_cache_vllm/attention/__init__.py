# SPDX-License-Identifier: Apache-2.0
"""Attention backends that wrap vLLM's own with per-layer block tables."""
