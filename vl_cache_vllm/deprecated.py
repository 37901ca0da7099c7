# SPDX-License-Identifier: Apache-2.0
"""Old names of settings and metrics, which still work (docs/configuration.md, docs/metrics.md)."""

from collections.abc import Container, Mapping
from typing import Any

from vl_cache_vllm.warn import warn_once

# Old name of a setting -> current name; a dot stands for a nested object.
SETTINGS = {
    "answer_reserve": "output_reserve",
    "pressure_high": "pressure.high",
    "pressure_low": "pressure.low",
    "trace_path": "trace.path",
    "trace_positions": "trace.positions",
    "trace_scores": "trace.scores",
    "elite_window": "experimental.elite_window",
    "diversity": "experimental.diversity",
}

# Settings that every policy accepted once, although only some policies read them.
WITHOUT_EFFECT = ("threshold",)

# Old name of a metric -> current name, both without vllm:kv_compress_.
METRICS = {
    "retained_share": "retained_ratio",
    "layer_retained_share": "layer_retained_ratio",
}


def with_current_names(values: Mapping[Any, Any], known: Container[Any]) -> dict[Any, Any]:
    """Settings under their current names; one warning lists the old names among them.

    Args:
        values: settings as given, left unchanged.
        known: current names at the top level. A policy's own setting may have an old name, which
            is then not translated.

    Raises:
        ValueError: if a setting is given under both names.
    """
    result = dict(values)
    notes = []
    for old, new in SETTINGS.items():
        group, _, name = new.rpartition(".")
        if old not in values or old in known or (group or name) not in known:
            continue
        target = result
        if group:
            target = result.get(group, {})
            if not isinstance(target, Mapping):
                raise ValueError(f"{group} must be an object, got {target!r}")
            target = result[group] = dict(target)
        if name in target:
            raise ValueError(f"{old} is the old name of {new}: give only one of them")
        target[name] = result.pop(old)
        notes.append(f"{old} is now {new}")
    for name in WITHOUT_EFFECT:
        if name in values and name not in known:
            del result[name]
            notes.append(f"{name} has no effect with this policy")
    if notes:
        warn_once(f"KV compression: deprecated settings: {', '.join(notes)}")
    return result
