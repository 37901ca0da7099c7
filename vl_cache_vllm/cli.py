# SPDX-License-Identifier: Apache-2.0
"""The ``--kv-compress*`` flags, and how they get into ``additional_config``."""

import argparse
import dataclasses
import json
from typing import Any

from vl_cache_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    OFF,
    WHEN,
    WITH_FLAGS,
    KVCompressConfig,
    describe_settings,
    with_current_names,
)
from vl_cache_vllm.policy import POLICIES


def add_cli_args(parser: Any) -> Any:
    """Add the argument group that ``vllm serve --help=kv-compress`` lists."""
    settings = {f.name: f for f in dataclasses.fields(KVCompressConfig)}

    def text_of(name: str) -> str:
        """The help text of a setting that has a flag, with its default."""
        return f"{settings[name].metadata['help']} (default: {settings[name].default})"

    group = parser.add_argument_group(
        title="kv-compress",
        description="KV cache compression for vision-language models (VL-Cache). After prefill, "
        "keep the tokens with the largest attention scores and free the cache blocks of the rest.",
    )
    group.add_argument(
        "--kv-compress",
        choices=[OFF, *POLICIES],
        default=argparse.SUPPRESS,
        help=f"Eviction policy; {OFF} leaves vLLM unchanged. (default: {OFF})",
    )
    group.add_argument(
        "--kv-compress-budget",
        type=_budget,
        default=argparse.SUPPRESS,
        metavar="FLOAT",
        help=text_of("budget"),
    )
    group.add_argument(
        "--kv-compress-when",
        choices=WHEN,
        default=argparse.SUPPRESS,
        help=text_of("when"),
    )
    group.add_argument(
        "--kv-compress-every",
        type=_tokens,
        default=argparse.SUPPRESS,
        metavar="TOKENS",
        help=text_of("every"),
    )
    group.add_argument(
        "--kv-compress-text",
        action="store_true",
        default=argparse.SUPPRESS,
        help=f"{text_of('text')} Requires a policy that is defined for them: "
        f"{', '.join(POLICIES.for_text())}.",
    )
    group.add_argument(
        "--kv-compress-config",
        type=_json_object,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help="All other settings, a JSON object. A dot in a name stands for a nested object: "
        f'trace.path is {{"trace": {{"path": ...}}}}. Keys:\n{describe_settings()}',
    )
    return parser


def move_flags_to_additional_config(args: argparse.Namespace) -> None:
    """Move the parsed flags into ``args.additional_config``.

    vLLM passes that on to all processes. The API server processes that it starts from ``args``
    build their `EngineArgs` before they load plugins, so they do not know the flags.

    Raises:
        ValueError: for flags that contradict each other or contain unknown settings.
    """
    flags = vars(args)
    policy = flags.pop("kv_compress", None)
    given: dict[str, Any] = dict(flags.pop("kv_compress_config", None) or {})
    if given.keys() & set(WITH_FLAGS):
        raise ValueError(
            "give policy, budget, when, every and text as --kv-compress, --kv-compress-budget, "
            "--kv-compress-when, --kv-compress-every and --kv-compress-text, not in "
            "--kv-compress-config"
        )
    for name in WITH_FLAGS[1:]:  # all but the policy
        if (value := flags.pop(f"kv_compress_{name}", None)) is not None:
            given[name] = value
    if policy is None and not given:
        return
    settings = {"policy": policy or OFF, **given}
    config = KVCompressConfig.from_dict(settings)  # fail before the model config is read
    additional = flags.get("additional_config") or {}
    if ADDITIONAL_CONFIG_KEY in additional:
        raise ValueError(
            f"KV compression is set both by --kv-compress flags and by "
            f"--additional-config's {ADDITIONAL_CONFIG_KEY!r}; use one of them"
        )
    if config is not None:
        # Without old names, so that no other process warns of them again.
        args.additional_config = {
            **additional,
            ADDITIONAL_CONFIG_KEY: with_current_names(settings),
        }


def _budget(text: str) -> float:
    try:
        value = float(text)
        KVCompressConfig(budget=value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a budget: it must be a number greater than 0 and at most 1, "
            "the fraction of a prompt's KV cache to keep (0.1 keeps a tenth)"
        ) from error
    return value


def _tokens(text: str) -> int:
    try:
        value = int(text)
        KVCompressConfig(every=value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens: it must be an integer of at least 1"
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
