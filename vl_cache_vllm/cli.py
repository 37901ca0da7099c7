# SPDX-License-Identifier: Apache-2.0
"""The --kv-compress* flags and their way into ``additional_config``."""

import argparse
import json
from typing import Any

from vl_cache_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    DEFAULT_BUDGET,
    OFF,
    WHEN,
    WITH_FLAGS,
    KVCompressConfig,
    describe_settings,
)
from vl_cache_vllm.policy import POLICIES


def add_cli_args(parser: Any) -> Any:
    """Add the argument group; listed by ``vllm serve --help=kv-compress``."""
    group = parser.add_argument_group(
        title="kv-compress",
        description="KV cache compression for vision-language models (VL-Cache): after prefill, "
        "free the cache blocks of tokens that the text after the image does not attend to.",
    )
    group.add_argument(
        "--kv-compress",
        choices=[OFF, *POLICIES],
        default=argparse.SUPPRESS,
        help=f"Eviction policy, or none to leave vLLM as it is. (default: {OFF})",
    )
    group.add_argument(
        "--kv-compress-budget",
        type=_budget,
        default=argparse.SUPPRESS,
        metavar="FLOAT",
        help="Share of a prompt's KV cache blocks that is kept after prefill, greater than 0 and "
        f"at most 1 (default: {DEFAULT_BUDGET}). 1 evicts nothing.",
    )
    group.add_argument(
        "--kv-compress-when",
        choices=WHEN,
        default=argparse.SUPPRESS,
        help="always: evict every prompt that can be; pressure: only those whose prefill ends "
        f"while blocks are scarce, so that a light load keeps every token. (default: {WHEN[0]})",
    )
    group.add_argument(
        "--kv-compress-text",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Evict text-only prompts too; with policies that are defined for them: "
        f"{', '.join(POLICIES.for_text())}.",
    )
    group.add_argument(
        "--kv-compress-config",
        type=_json_object,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help=f"Parameters of the policy, a JSON object. Keys:\n{describe_settings()}",
    )
    return parser


def move_flags_to_additional_config(args: argparse.Namespace) -> None:
    """Move the parsed flags into ``args.additional_config``.

    That is where vLLM keeps them, also for the API server processes that it starts from ``args``:
    they build their `EngineArgs` before they load plugins.

    Raises:
        ValueError: for flags that contradict each other or name unknown parameters.
    """
    flags = vars(args)
    policy = flags.pop("kv_compress", None)
    given: dict[str, Any] = dict(flags.pop("kv_compress_config", None) or {})
    if given.keys() & set(WITH_FLAGS):
        raise ValueError(
            "give policy, budget, when and text as --kv-compress, --kv-compress-budget, "
            "--kv-compress-when and --kv-compress-text, not in --kv-compress-config"
        )
    for name in WITH_FLAGS[1:]:  # all but the policy
        if (value := flags.pop(f"kv_compress_{name}", None)) is not None:
            given[name] = value
    if policy is None and not given:
        return
    settings = {"policy": policy or OFF, **given}
    config = KVCompressConfig.from_dict(settings)  # fail here, before the model config is read
    additional = flags.get("additional_config") or {}
    if ADDITIONAL_CONFIG_KEY in additional:
        raise ValueError(
            f"KV compression is set both by --kv-compress flags and by "
            f"--additional-config's {ADDITIONAL_CONFIG_KEY!r}; use one of them"
        )
    if config is not None:
        args.additional_config = {**additional, ADDITIONAL_CONFIG_KEY: settings}


def _budget(text: str) -> float:
    try:
        value = float(text)
        KVCompressConfig(budget=value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a budget: it must be a number greater than 0 and at most 1, "
            "the share of a prompt's KV cache to keep (0.1 keeps a tenth)"
        ) from error
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value
