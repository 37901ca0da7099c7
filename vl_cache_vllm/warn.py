# SPDX-License-Identifier: Apache-2.0
"""Warnings of the plugin in vLLM's log."""

import functools
import logging
import multiprocessing


@functools.cache
def warn_once(message: str) -> None:
    """Warn once, in the process that the user started and not in its children."""
    if multiprocessing.parent_process() is None:
        logging.getLogger("vllm.vl_cache").warning(message)
