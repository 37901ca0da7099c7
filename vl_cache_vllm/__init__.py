# SPDX-License-Identifier: Apache-2.0
"""VL-Cache (arXiv 2410.23317) for vLLM: per-layer KV cache eviction for vision-language models."""

__version__ = "0.1.0.dev0"
