# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: loaded in the API server, the engine core and workers."""


def register() -> None:
    """Add KV compression to vLLM. Idempotent and cheap; does nothing until it is switched on."""
    from vl_cache_vllm.install import install

    install()
