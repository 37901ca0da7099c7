# SPDX-License-Identifier: Apache-2.0
"""The settings of KV compression and their one place of validation.

They travel in ``VllmConfig.additional_config["kv_compress"]``, a plain JSON object, so that
every process of an engine sees the same settings and the compile cache tells them apart.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from vl_cache_vllm.policy import POLICIES, EvictionPolicy, setting
from vl_cache_vllm.policy.vlcache import VLCachePolicy

ADDITIONAL_CONFIG_KEY = "kv_compress"
OFF = "none"
DEFAULT_BUDGET = 0.1
WHEN = ("always", "pressure")
PRESSURE = (0.9, 0.7)
WITH_FLAGS = ("policy", "budget", "when", "text")  # settings that have flags of their own
REQUEST_BUDGET = "kv_budget"
REQUEST_OPTIONS = "kv_policy_options"


@dataclass(frozen=True)
class KVCompressConfig:
    """Validated settings of KV compression; hashable, picklable, comparable."""

    policy: EvictionPolicy = field(default_factory=VLCachePolicy)
    budget: float = setting(
        DEFAULT_BUDGET, "share of a prompt's KV cache blocks that is kept; 1 evicts nothing"
    )
    when: str = setting(
        WHEN[0],
        "always: evict every prompt that can be; pressure: only those whose prefill ends while "
        "blocks are scarce",
    )
    pressure_high: float = setting(
        PRESSURE[0],
        "pressure begins when running requests' blocks and what waiting ones will ask for reach "
        "this share of the pool",
    )
    pressure_low: float = setting(PRESSURE[1], "and ends when they have fallen to this share")
    output_reserve: bool = setting(
        True,
        "admit a prompt only while the answers of evicted requests, as long as the latest ones "
        "were, will still find blocks",
    )
    text: bool = setting(False, "evict text-only prompts too")
    min_prompt_tokens: int = setting(0, "shorter prompts keep their whole cache")
    trace_path: str | None = setting(
        None,
        "append one JSON line per eviction to this file (debugging and research: reads the "
        "device back at every eviction)",
    )
    trace_positions: bool = setting(
        False, "also trace the kept positions of every layer and KV head"
    )
    trace_scores: bool = setting(
        False,
        "also trace the attention that every token received and the score it ranks by, of every "
        "layer and KV head",
    )

    def __post_init__(self) -> None:
        _check_budget("the KV cache budget", self.budget)
        if self.when not in WHEN:
            raise ValueError(f"when must be one of {', '.join(WHEN)}, got {self.when!r}")
        if not 0.0 <= self.pressure_low <= self.pressure_high <= 1.0:
            raise ValueError(
                "pressure_low and pressure_high are shares of the block pool, from 0 to 1, the "
                f"first not above the second; got {self.pressure_low} and {self.pressure_high}"
            )
        if self.text and not self.policy.for_text:
            raise ValueError(
                f"policy {self.policy.name!r} is not defined for text-only prompts "
                f"(--kv-compress-text); these are: {', '.join(POLICIES.for_text())}"
            )
        if self.when == "always" and (self.pressure_high, self.pressure_low) != PRESSURE:
            raise ValueError(
                "pressure_high and pressure_low have no effect without --kv-compress-when pressure"
            )
        if self.trace_path is None and (self.trace_positions or self.trace_scores):
            raise ValueError("trace_positions and trace_scores need trace_path, the file to write")
        if self.min_prompt_tokens < 0:
            raise ValueError(f"min_prompt_tokens must be at least 0, got {self.min_prompt_tokens}")

    def kept_blocks(self, prompt_blocks: int) -> int:
        """M = ceil(budget * N) blocks, of the budget as written: 0.1 of 10 blocks is 1."""
        return math.ceil(Fraction(str(self.budget)) * prompt_blocks)

    def for_request(self, extra_args: Mapping[str, Any] | None) -> KVCompressConfig:
        """These settings with a request's own.

        Args:
            extra_args: ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP): ``kv_budget``, a
                number; ``kv_policy_options``, parameters of the policy as an object or as JSON
                text (what ``vllm_xargs`` can carry). Other keys are not ours.

        Raises:
            ValueError: with what is wrong and what is accepted.
        """
        if not extra_args or not (REQUEST_BUDGET in extra_args or REQUEST_OPTIONS in extra_args):
            return self
        budget, options = self.budget, {}
        if REQUEST_BUDGET in extra_args:
            budget = _coerce(REQUEST_BUDGET, extra_args[REQUEST_BUDGET], float)
            _check_budget(REQUEST_BUDGET, budget)
        if REQUEST_OPTIONS in extra_args:
            options = _policy_options(self.policy, extra_args[REQUEST_OPTIONS])
        policy = dataclasses.replace(self.policy, **options) if options else self.policy
        return dataclasses.replace(self, policy=policy, budget=budget)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> KVCompressConfig | None:
        """Parse the user's settings.

        Args:
            settings: ``{"policy": ..., "budget": ..., <parameter>: ...}`` or None.

        Returns:
            The configuration, or None when compression is off (no settings, policy "none").

        Raises:
            ValueError: with what is wrong and what is accepted.
        """
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"{ADDITIONAL_CONFIG_KEY} must be a JSON object such as "
                f'{{"policy": "vlcache", "budget": 0.1}}, got {settings!r}'
            )
        values = dict(settings)
        name = values.pop("policy", OFF)
        if name == OFF:
            if values:
                raise ValueError(
                    f"KV compression is off (policy {OFF!r}), but these settings were given: "
                    f"{', '.join(sorted(map(str, values)))}. Choose a policy: "
                    f"{', '.join(POLICIES)}"
                )
            return None
        if not isinstance(name, str) or name not in POLICIES:
            raise ValueError(
                f"unknown KV compression policy {name!r}; known: {OFF}, {', '.join(POLICIES)}"
            )
        policy_cls = POLICIES[name]
        own, parameters = _field_types(cls, skip="policy"), _field_types(policy_cls)
        checked = _checked("KV compression setting(s)", values, parameters | own, name)
        policy = policy_cls(**{k: v for k, v in checked.items() if k in parameters})
        return cls(policy=policy, **{k: v for k, v in checked.items() if k in own})

    def to_dict(self) -> dict[str, Any]:
        """The settings as the plain JSON object that `from_dict` reads."""
        values = {"policy": self.policy.name, **dataclasses.asdict(self.policy)}
        return values | {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "policy"
        }


def _check_budget(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"{name} must be greater than 0 and at most 1, got {value} "
            "(it is the retained share of a prompt's KV cache: 0.1 keeps a tenth)"
        )


def _policy_options(policy: EvictionPolicy, options: Any) -> dict[str, Any]:
    """A request's parameters of the policy, checked."""
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{REQUEST_OPTIONS} is not valid JSON: {error}") from None
    if not isinstance(options, Mapping):
        raise ValueError(
            f'{REQUEST_OPTIONS} must be an object such as {{"max_observation_tokens": 50}}, '
            f"or its JSON text, got {options!r}"
        )
    return _checked(f"{REQUEST_OPTIONS}:", options, _field_types(type(policy)), policy.name)


def _checked(
    what: str, values: Mapping[str, Any], known: Mapping[str, Any], policy: str
) -> dict[str, Any]:
    """The values, each of its known type."""
    if unknown := [key for key in values if key not in known]:
        raise ValueError(
            f"unknown {what} {', '.join(map(repr, unknown))}; "
            f"known for policy {policy!r}: {', '.join(sorted(known))}"
        )
    return {key: _coerce(key, value, known[key]) for key, value in values.items()}


def get_kv_compress_config(vllm_config: Any) -> KVCompressConfig | None:
    """The settings of a ``VllmConfig``; None when compression is off."""
    additional = vllm_config.additional_config
    return KVCompressConfig.from_dict(
        additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
    )


def describe_settings() -> str:
    """The settings that ``--kv-compress-config`` accepts: of every policy, then what differs."""
    own = [f for f in dataclasses.fields(KVCompressConfig) if f.name not in WITH_FLAGS]
    # vLLM's help breaks lines at bullets only, so headings are bullets, too.
    lines = ["- EVERY POLICY:", *map(_describe, (*dataclasses.fields(EvictionPolicy), *own))]
    for name in POLICIES:
        try:
            cls = POLICIES[name]
        except ValueError as error:  # a package's that is broken: no reason to refuse the others
            lines.append(f"- POLICY {name}: {error}")
            continue
        base: type[EvictionPolicy] = cls.__mro__[1]
        inherited = {(f.name, f.default) for f in dataclasses.fields(base)}
        alike = "" if base is EvictionPolicy else f", otherwise as {base.name}"
        lines.append(f"- POLICY {name}{alike}:")
        new = (f for f in dataclasses.fields(cls) if (f.name, f.default) not in inherited)
        lines += map(_describe, new)
    return "\n".join(lines)


def _describe(setting: dataclasses.Field) -> str:
    default = json.dumps(setting.default)
    return f"- {setting.name} (default {default}): {setting.metadata['help']}"


# Resolving annotations is slow, and a waiting request is asked in every step.
_type_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _field_types(cls: type, skip: str = "") -> dict[str, Any]:
    hints = _type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != skip}


def _coerce(key: str, value: Any, expected: Any) -> Any:
    """Check a JSON value against a field's annotation; ints pass as floats, nothing else bends."""
    union = isinstance(expected, types.UnionType)
    accepted = set(typing.get_args(expected)) if union else {expected}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if float in accepted and is_number and abs(value) < sys.float_info.max:
        return float(value)
    if type(value) in accepted and type(value) is not float:
        return value
    names = " or ".join(sorted("null" if t is type(None) else t.__name__ for t in accepted))
    raise ValueError(f"{key} must be of type {names}, got {value!r}")
