# SPDX-License-Identifier: Apache-2.0
"""The settings of KV compression, and the one place that validates them.

They travel in ``VllmConfig.additional_config["kv_compress"]`` as a plain JSON object. So every
process of an engine has the same settings, and vLLM's compile cache tells them apart.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vl_cache_vllm import deprecated
from vl_cache_vllm.policy import POLICIES, EvictionPolicy, setting
from vl_cache_vllm.policy.experimental import ExperimentalOptions
from vl_cache_vllm.policy.vlcache import VLCachePolicy

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

ADDITIONAL_CONFIG_KEY = "kv_compress"
OFF = "none"
DEFAULT_BUDGET = 0.1
WHEN = ("always", "pressure")
WITH_FLAGS = ("policy", "budget", "when", "every", "text")  # settings that have flags of their own
REQUEST_BUDGET = "kv_budget"
REQUEST_EVERY = "kv_evict_every"
REQUEST_OPTIONS = "kv_policy_options"
REQUEST_SETTINGS = (REQUEST_BUDGET, REQUEST_EVERY, REQUEST_OPTIONS)


@dataclass(frozen=True)
class PressureConfig:
    """The demand for blocks at which ``when="pressure"`` starts and stops evicting."""

    high: float = setting(
        0.9,
        "Start evicting when the blocks of running requests plus the blocks that waiting prompts "
        "require reach this fraction of the block pool. Requires --kv-compress-when pressure.",
    )
    low: float = setting(
        0.7,
        "Stop evicting when that demand falls to this fraction of the block pool, at most "
        "pressure.high.",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(
                "pressure.low and pressure.high are fractions of the block pool, from 0 to 1, the "
                f"first not above the second; got {self.low} and {self.high}"
            )


@dataclass(frozen=True)
class TraceConfig:
    """The trace file, for debugging and research (docs/adr/0005)."""

    path: str | None = setting(
        None,
        "File to which each eviction appends one JSON line, for debugging and research. Each "
        "eviction then waits for the device. null: no trace.",
    )
    positions: bool = setting(
        False,
        "Also record the kept positions of every layer and KV head. Requires trace.path.",
    )
    scores: bool = setting(
        False,
        "Also record the attention that each token received and its score, for every layer and KV "
        "head. Requires trace.path.",
    )

    def __post_init__(self) -> None:
        if self.path is None and (self.positions or self.scores):
            raise ValueError("trace.positions and trace.scores need trace.path, the file to write")


@functools.lru_cache(maxsize=256)  # the scheduler asks several times a step
def _ratio(budget: float) -> tuple[int, int]:
    """Numerator and denominator of a budget, as its decimal form has it."""
    return Fraction(str(budget)).as_integer_ratio()


@dataclass(frozen=True)
class KVCompressConfig:
    """Validated settings of KV compression; hashable, picklable, comparable.

    Raises:
        ValueError: if a setting is out of range, or settings contradict each other.
    """

    policy: EvictionPolicy = field(default_factory=VLCachePolicy)
    budget: float = setting(
        DEFAULT_BUDGET,
        "Fraction of a prompt's KV cache blocks to keep after prefill, greater than 0 and at most "
        "1, rounded up to whole blocks. 1 evicts nothing.",
    )
    when: str = setting(
        WHEN[0],
        "always: evict every eligible prompt. pressure: evict only while free blocks are scarce, "
        "prompts when their prefill ends and running requests before any is preempted, so that a "
        "lightly loaded server keeps the full cache.",
    )
    every: int | None = setting(
        None,
        "Evict a request again whenever it has generated this many tokens since its last eviction, "
        "at least 1, rounded up to whole blocks. Bounds the cache of long outputs. null: never.",
    )
    text: bool = setting(False, "Also evict text-only prompts.")
    min_prompt_tokens: int = setting(
        0,
        "Minimum length of a prompt to be evicted, in tokens, visual tokens included. Shorter "
        "prompts keep their full cache. 0: no minimum.",
    )
    output_reserve: bool = setting(
        True,
        "Before admitting a new prompt, hold back enough free blocks for running evicted requests "
        "to finish, estimated from recent output lengths. false: use only vLLM's own admission "
        "rule, which can lead to more preemptions.",
    )
    pressure: PressureConfig = field(default_factory=PressureConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    experimental: ExperimentalOptions = field(default_factory=ExperimentalOptions)

    def __post_init__(self) -> None:
        _check_budget("the KV cache budget", self.budget)
        if self.when not in WHEN:
            raise ValueError(f"when must be one of {', '.join(WHEN)}, got {self.when!r}")
        if self.text and not self.policy.for_text:
            raise ValueError(
                f"policy {self.policy.name!r} is not defined for text-only prompts "
                f"(--kv-compress-text); these are: {', '.join(POLICIES.for_text())}"
            )
        if self.when == "always" and self.pressure != PressureConfig():
            raise ValueError(
                "pressure.high and pressure.low have no effect without --kv-compress-when pressure"
            )
        if self.min_prompt_tokens < 0:
            raise ValueError(f"min_prompt_tokens must be at least 0, got {self.min_prompt_tokens}")
        self.experimental.check(self.policy)
        _check_every(self)

    def kept_blocks(self, prompt_blocks: int, block_size: int) -> int:
        """``ceil(budget * prompt_blocks)``, but enough blocks for the policy's minimum of tokens.

        Exact for the decimal budget: 0.1 of 10 blocks is 1. At most ``prompt_blocks``.
        """
        numerator, denominator = _ratio(self.budget)
        by_budget = -(-numerator * prompt_blocks // denominator)
        return min(prompt_blocks, max(by_budget, -(-self.policy.min_kept_tokens // block_size)))

    def for_request(self, params: SamplingParams | None) -> KVCompressConfig:
        """These settings with those that a request changes.

        Scheduler and workers both call this, so they agree about every request.
        Raises what `with_request_settings` raises.
        """
        return self.with_request_settings(params.extra_args if params is not None else None)

    def with_request_settings(self, extra_args: Mapping[str, Any] | None) -> KVCompressConfig:
        """These settings with those of ``SamplingParams.extra_args``.

        Args:
            extra_args: over HTTP ``vllm_xargs``. May hold ``kv_budget``, a number,
                ``kv_evict_every``, a number of tokens or null, and ``kv_policy_options``, settings
                of the policy and ``experimental`` as an object or as JSON text. Other keys are
                ignored.

        Raises:
            ValueError: with what is wrong and what is accepted.
        """
        if not extra_args or not any(key in extra_args for key in REQUEST_SETTINGS):
            return self
        budget, every = self.budget, self.every
        policy, experimental = self.policy, self.experimental
        if REQUEST_BUDGET in extra_args:
            budget = _coerce(REQUEST_BUDGET, extra_args[REQUEST_BUDGET], float)
            _check_budget(REQUEST_BUDGET, budget)
        if REQUEST_EVERY in extra_args:
            every = _coerce(REQUEST_EVERY, extra_args[REQUEST_EVERY], int | None)
        if REQUEST_OPTIONS in extra_args:
            options = _policy_options(policy, extra_args[REQUEST_OPTIONS])
            experimental = dataclasses.replace(experimental, **options.pop("experimental", {}))
            policy = dataclasses.replace(policy, **options)
        return dataclasses.replace(
            self, policy=policy, budget=budget, every=every, experimental=experimental
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> KVCompressConfig | None:
        """Parse the user's settings.

        Args:
            settings: ``{"policy": ..., "budget": ..., <setting>: ...}`` or None; old names of
                settings are accepted.

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
        own, of_policy = _field_types(cls, skip="policy"), _field_types(policy_cls)
        known = of_policy | own
        values = deprecated.with_current_names(values, known)
        checked = _checked("KV compression setting(s)", values, known, f" for policy {name!r}")
        policy = policy_cls(**{k: v for k, v in checked.items() if k in of_policy})
        groups = {k: known[k](**checked.pop(k)) for k in GROUPS if k in checked}
        return cls(policy=policy, **groups, **{k: v for k, v in checked.items() if k in own})

    def to_dict(self) -> dict[str, Any]:
        """All settings as the plain JSON object that `from_dict` reads."""
        own = dataclasses.asdict(self)
        return {"policy": self.policy.name, **own.pop("policy"), **own}

    def flat(self) -> dict[str, Any]:
        """All settings by their names in the documentation: ``trace.path`` is in ``trace``."""
        values = self.to_dict()
        for group in GROUPS:
            values |= {f"{group}.{name}": value for name, value in values.pop(group).items()}
        return values

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.flat().items())


GROUPS = ("pressure", "trace", "experimental")
"""Settings that are nested objects."""


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings without old names, if they choose a policy."""
    policy = settings.get("policy", OFF)
    of_policy = _field_types(POLICIES[policy]) if policy in POLICIES else {}
    return deprecated.with_current_names(settings, of_policy | _field_types(KVCompressConfig))


def _check_budget(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"{name} must be greater than 0 and at most 1, got {value} "
            "(it is the fraction of a prompt's KV cache to keep: 0.1 keeps a tenth)"
        )


def _check_every(config: KVCompressConfig) -> None:
    """Raise ValueError if ``every`` is out of range or contradicts another setting."""
    if config.every is None:
        return
    if config.every < 1:
        raise ValueError(f"every must be at least 1 token or null, got {config.every}")
    # After the first eviction every KV head has other tokens, so that nobody knows which are text
    # or where they were in an image.
    contradicting = [
        name for name in ("keep_text", "pooling_2d") if getattr(config.policy, name, 0)
    ]
    contradicting += [
        f"experimental.{name}" for name, value in vars(config.experimental).items() if value
    ]
    if contradicting:
        raise ValueError(
            "a request cannot be evicted again (--kv-compress-every, kv_evict_every) with "
            f"{', '.join(contradicting)}, which need the tokens of a prompt"
        )


def _policy_options(policy: EvictionPolicy, options: Any) -> dict[str, Any]:
    """A request's settings of the policy and of ``experimental``, checked."""
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
    known = _field_types(type(policy)) | {"experimental": ExperimentalOptions}
    options = deprecated.with_current_names(options, known)
    return _checked(f"{REQUEST_OPTIONS}:", options, known, f" for policy {policy.name!r}")


def _checked(
    what: str,
    values: Mapping[str, Any],
    known: Mapping[str, Any],
    known_for: str = "",
    prefix: str = "",
) -> dict[str, Any]:
    """The values, each of its known type; a nested object is a dict of such values."""
    if unknown := [key for key in values if key not in known]:
        raise ValueError(
            f"unknown {what} {', '.join(map(repr, unknown))}; "
            f"known{known_for}: {', '.join(sorted(known))}"
        )
    checked = {}
    for key, value in values.items():
        name, expected = prefix + key, known[key]
        if not (isinstance(expected, type) and dataclasses.is_dataclass(expected)):
            checked[key] = _coerce(name, value, expected)
        elif isinstance(value, Mapping):
            checked[key] = _checked(
                f"{key} setting(s)", value, _field_types(expected), "", f"{key}."
            )
        else:
            raise ValueError(f"{name} must be an object, got {value!r}")
    return checked


def get_kv_compress_config(vllm_config: Any) -> KVCompressConfig | None:
    """The settings of a ``VllmConfig``; None when compression is off."""
    additional = vllm_config.additional_config
    return KVCompressConfig.from_dict(
        additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
    )


def describe_settings() -> str:
    """The settings that ``--kv-compress-config`` accepts, for ``--help``."""
    own = [f for f in dataclasses.fields(KVCompressConfig) if f.name not in WITH_FLAGS]
    plain = [f for f in own if f.name not in GROUPS]
    # vLLM's help breaks lines at bullets only, so headings are bullets, too.
    lines = ["- EVERY POLICY:", *map(_describe, (*dataclasses.fields(EvictionPolicy), *plain))]
    for group in GROUPS:
        lines += (
            _describe(f, f"{group}.")
            for f in dataclasses.fields(_field_types(KVCompressConfig)[group])
        )
    for name in POLICIES:
        try:
            cls = POLICIES[name]
        except ValueError as error:  # a broken package must not hide the other policies
            lines.append(f"- POLICY {name}: {error}")
            continue
        base: type[EvictionPolicy] = cls.__mro__[1]
        inherited = {(f.name, f.default) for f in dataclasses.fields(base)}
        alike = "" if base is EvictionPolicy else f", otherwise as {base.name}"
        lines.append(f"- POLICY {name}{alike}:")
        new = (f for f in dataclasses.fields(cls) if (f.name, f.default) not in inherited)
        lines += map(_describe, new)
    return "\n".join(lines)


def _describe(setting: dataclasses.Field, prefix: str = "") -> str:
    default = json.dumps(setting.default)
    return f"- {prefix}{setting.name} (default {default}): {setting.metadata['help']}"


# Resolving annotations is slow, and the scheduler plans a waiting request in every step.
_type_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _field_types(cls: type, skip: str = "") -> dict[str, Any]:
    hints = _type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != skip}


def _coerce(key: str, value: Any, expected: Any) -> Any:
    """Check a JSON value against a field's annotation; only ints pass for another type, float."""
    union = isinstance(expected, types.UnionType)
    accepted = set(typing.get_args(expected)) if union else {expected}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if float in accepted and is_number and abs(value) < sys.float_info.max:
        return float(value)
    if type(value) in accepted and type(value) is not float:
        return value
    names = " or ".join(sorted("null" if t is type(None) else t.__name__ for t in accepted))
    raise ValueError(f"{key} must be of type {names}, got {value!r}")
