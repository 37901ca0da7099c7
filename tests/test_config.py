# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted, what each refusal says, and the arithmetic of the budget."""

import copy
import json
import logging
import pickle
import re
from dataclasses import replace
from fractions import Fraction
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from vl_cache_vllm import deprecated
from vl_cache_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    DEFAULT_BUDGET,
    KVCompressConfig,
    PressureConfig,
    TraceConfig,
    describe_settings,
    get_kv_compress_config,
    with_current_names,
)
from vl_cache_vllm.policy import POLICIES
from vl_cache_vllm.policy.experimental import ExperimentalOptions
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.warn import warn_once

EVERY_SETTING = {
    "policy": "vlcache",
    "budget": 0.25,
    "when": "pressure",
    "every": None,
    "text": False,
    "min_prompt_tokens": 100,
    "output_reserve": False,
    "pressure": {"high": 0.8, "low": 0.5},
    "trace": {"path": "/tmp/trace.jsonl", "positions": True, "scores": True},
    "experimental": {"elite_window": 0.9, "diversity": 0.5},
    "threshold": 0.02,
    "recent_ratio": 0.2,
    "max_observation_tokens": 50,
    "post_vision_only": False,
    "sink_tokens": 4,
    "min_kept_tokens": 96,
    "evict_after": 0,  # elite_window needs it
    "keep_text": True,
    "pooling": 3,
    "pooling_2d": True,
    "uniform_mix": 0.8,
    "shared_scores": 0.5,
    "lookahead": 40.0,
    "lookahead_share": 0.25,
    "short_lookahead": 2.0,
    "min_layer_budget": 0.05,
}
ONE_PLACE_EACH = {  # by the names of the documentation
    **{key: value for key, value in EVERY_SETTING.items() if not isinstance(value, dict)},
    **{
        f"{group}.{name}": value
        for group, values in EVERY_SETTING.items()
        if isinstance(values, dict)
        for name, value in values.items()
    },
}
OLD_SPELLING = {**ONE_PLACE_EACH, **{o: ONE_PLACE_EACH[n] for o, n in deprecated.SETTINGS.items()}}
for new in deprecated.SETTINGS.values():
    del OLD_SPELLING[new]


def request(**extra_args: Any) -> SamplingParams:
    return SamplingParams(extra_args=extra_args or None)


def parse(**values: Any) -> KVCompressConfig:
    config = KVCompressConfig.from_dict({"policy": "vlcache", **values})
    assert config is not None
    return config


@pytest.mark.parametrize(
    "values", [None, {}, {"policy": "none"}], ids=["no-settings", "empty", "none"]
)
def test_off(values: dict[str, Any] | None) -> None:
    assert KVCompressConfig.from_dict(values) is None


def test_defaults() -> None:
    config = parse()
    assert config == KVCompressConfig()
    assert config.policy == VLCachePolicy()
    assert config.budget == DEFAULT_BUDGET == 0.1
    assert (config.when, config.pressure) == ("always", PressureConfig(high=0.9, low=0.7))
    assert config.min_prompt_tokens == 0
    assert config.output_reserve
    assert config.trace == TraceConfig(path=None, positions=False, scores=False)
    assert config.experimental == ExperimentalOptions(0.0, 0.0)


def test_every_setting_is_parsed() -> None:
    config = KVCompressConfig.from_dict(EVERY_SETTING)
    assert config == KVCompressConfig(
        policy=VLCachePolicy(
            threshold=0.02,
            recent_ratio=0.2,
            max_observation_tokens=50,
            post_vision_only=False,
            sink_tokens=4,
            min_kept_tokens=96,
            evict_after=0,
            keep_text=True,
            pooling=3,
            pooling_2d=True,
            uniform_mix=0.8,
            shared_scores=0.5,
            lookahead=40.0,
            lookahead_share=0.25,
            short_lookahead=2.0,
            min_layer_budget=0.05,
        ),
        budget=0.25,
        when="pressure",
        output_reserve=False,
        min_prompt_tokens=100,
        pressure=PressureConfig(high=0.8, low=0.5),
        trace=TraceConfig(path="/tmp/trace.jsonl", positions=True, scores=True),
        experimental=ExperimentalOptions(elite_window=0.9, diversity=0.5),
    )
    assert config is not None
    assert config.to_dict() == EVERY_SETTING
    assert config.flat() == ONE_PLACE_EACH
    assert "trace.path=/tmp/trace.jsonl, trace.positions=True" in str(config)


@pytest.mark.parametrize("given", [EVERY_SETTING, OLD_SPELLING], ids=["current", "old"])
def test_parsing_leaves_the_settings_unchanged(given: dict[str, Any]) -> None:
    values = copy.deepcopy(given)
    KVCompressConfig.from_dict(values)
    assert values == given


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of, each once for a process."""
    written: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.vl_cache"), "warning", written.append)
    warn_once.cache_clear()
    return written


def test_old_names_are_accepted_with_one_warning(warnings: list[str]) -> None:
    for _ in range(2):
        assert KVCompressConfig.from_dict(OLD_SPELLING) == KVCompressConfig.from_dict(EVERY_SETTING)
    (warning,) = warnings
    for old, new in deprecated.SETTINGS.items():
        assert f"{old} is now {new}" in warning


@pytest.mark.parametrize("old", deprecated.SETTINGS)
def test_each_old_name_alone(warnings: list[str], old: str) -> None:
    new = deprecated.SETTINGS[old]
    group, _, name = new.rpartition(".")
    value = OLD_SPELLING[old]
    rest = {"when": "pressure", "max_observation_tokens": 50}
    if old in ("trace_positions", "trace_scores"):
        rest["trace"] = {"path": "t"}
    current = {**rest, group: {**rest.get(group, {}), name: value}} if group else {name: value}
    assert parse(**rest, **{old: value}) == parse(**{**rest, **current})
    assert warnings == [f"KV compression: deprecated settings: {old} is now {new}"]
    both = {**rest, **current, old: value}
    with pytest.raises(ValueError, match=f"{old} is the old name of {new}: give only one of them"):
        parse(**both)


def test_current_names_are_not_warned_of(warnings: list[str]) -> None:
    assert with_current_names(OLD_SPELLING) == EVERY_SETTING
    assert len(warnings) == 1
    assert with_current_names(EVERY_SETTING) == EVERY_SETTING
    KVCompressConfig.from_dict(EVERY_SETTING)
    assert len(warnings) == 1


def test_child_processes_do_not_warn(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert parse(trace_path="t") == parse(trace={"path": "t"})
    assert not warnings


def test_threshold_is_ignored_where_it_has_no_effect(warnings: list[str]) -> None:
    """Only policies that read the density of attention have it as a setting."""
    config = parse(policy="snapkv", threshold=0.5)
    assert config == parse(policy="snapkv")
    assert config.for_request(request(kv_policy_options={"threshold": 0.2})) == config
    note = "KV compression: deprecated settings: threshold has no effect with this policy"
    assert warnings == [note]
    assert parse(threshold=0.5).policy.density_threshold == 0.5
    assert parse(policy="snapkv").policy.density_threshold == 0.01


def test_a_policys_own_setting_may_have_an_old_name(warnings: list[str]) -> None:
    known = ["diversity", "experimental", "policy"]
    values = {"policy": "theirs", "diversity": 3}
    assert deprecated.with_current_names(values, known) == values
    assert not warnings


@pytest.mark.parametrize("group", ["pressure", "trace", "experimental"])
def test_groups_are_objects_of_known_settings(group: str) -> None:
    for value in (3, None, "a", [1]):
        with pytest.raises(ValueError, match=f"{group} must be an object, got "):
            parse(**{group: value})
    with pytest.raises(
        ValueError, match=rf"unknown {group} setting\(s\) 'x', 'y'; known: "
    ) as error:
        parse(**{group: {"x": 1, "y": 2}})
    assert str(error.value).split("known: ")[1].split(", ") == sorted(EVERY_SETTING[group])
    assert parse(**{group: {}}) == parse()


def test_integers_pass_as_floats() -> None:
    config = parse(budget=1, uniform_mix=0)
    assert config.budget == 1.0
    assert isinstance(config.budget, float)
    assert isinstance(config.policy, VLCachePolicy)
    assert isinstance(config.policy.uniform_mix, float)


def test_null_where_it_means_something() -> None:
    config = parse(trace={"path": None}, max_observation_tokens=None)
    assert config.trace.path is None
    assert config.policy.max_observation_tokens is None


def nested(key: str, value: Any) -> dict[str, Any]:
    """A setting by its name in the documentation."""
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


@pytest.mark.parametrize(
    ("key", "value", "expected_type"),
    [
        ("budget", "0.1", "float"),
        ("budget", True, "float"),
        ("budget", None, "float"),
        ("budget", [0.1], "float"),
        ("budget", float("nan"), "float"),
        ("budget", float("inf"), "float"),
        ("budget", float("-inf"), "float"),
        ("min_prompt_tokens", True, "int"),
        ("min_prompt_tokens", 1.0, "int"),
        ("min_prompt_tokens", "1", "int"),
        ("min_prompt_tokens", None, "int"),
        ("trace.path", 1, "null or str"),
        ("trace.path", False, "null or str"),
        ("trace.positions", 1, "bool"),
        ("trace.positions", "true", "bool"),
        ("pressure.high", "0.9", "float"),
        ("experimental.diversity", True, "float"),
        ("threshold", "low", "float"),
        ("threshold", True, "float"),
        ("recent_ratio", float("nan"), "float"),
        ("max_observation_tokens", True, "int or null"),
        ("max_observation_tokens", 2.0, "int or null"),
        ("pooling", 3.0, "int"),
        ("pooling", True, "int"),
        ("uniform_mix", float("inf"), "float"),
        ("min_layer_budget", {}, "float"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else value,
)
def test_wrong_type(key: str, value: Any, expected_type: str) -> None:
    name = re.escape(key)
    with pytest.raises(ValueError, match=f"^{name} must be of type {expected_type}, got ") as error:
        parse(**nested(key, value))
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.0000001, 10, -1])
def test_budget_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match="greater than 0 and at most 1, got") as error:
        parse(budget=budget)
    assert str(float(budget)) in str(error.value)


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), 0.0, -1.0])
def test_budget_is_checked_without_from_dict(budget: float) -> None:
    with pytest.raises(ValueError, match="greater than 0 and at most 1"):
        KVCompressConfig(budget=budget)


def test_negative_min_prompt_tokens() -> None:
    with pytest.raises(ValueError, match=r"min_prompt_tokens must .*got -1"):
        parse(min_prompt_tokens=-1)


@pytest.mark.parametrize("when", ["", "Always", "never"])
def test_unknown_when(when: str) -> None:
    with pytest.raises(ValueError, match=f"when must be one of always, pressure, got '{when}'"):
        parse(when=when)


@pytest.mark.parametrize(
    ("high", "low"), [(0.5, 0.6), (1.1, 0.5), (0.5, -0.1), (float("nan"), 0.1), (0.5, float("nan"))]
)
def test_pressure_thresholds_out_of_range(high: float, low: float) -> None:
    with pytest.raises(ValueError, match="the first not above the second"):
        PressureConfig(high, low)


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "h2o", "streamingllm", "random"])
def test_text(policy: str) -> None:
    assert parse(policy=policy, text=True).text


@pytest.mark.parametrize("policy", ["vlcache", "vlcache-plus"])
def test_text_needs_a_policy_for_it(policy: str) -> None:
    with pytest.raises(ValueError, match="not defined for text-only prompts") as error:
        parse(policy=policy, text=True)
    assert str(error.value).endswith("these are: h2o, pyramidkv, random, snapkv, streamingllm")


def test_pressure_thresholds_without_pressure() -> None:
    with pytest.raises(ValueError, match="no effect without --kv-compress-when pressure"):
        parse(pressure={"high": 0.5, "low": 0.2})


def test_pressure_thresholds_may_be_equal() -> None:
    config = parse(when="pressure", pressure={"high": 0.5, "low": 0.5})
    assert config.pressure.high == config.pressure.low


@pytest.mark.parametrize("options", [{"positions": True}, {"scores": True}], ids=str)
def test_a_trace_needs_its_file(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"need trace\.path, the file to write"):
        parse(trace=options)


@pytest.mark.parametrize("bad", [None, 1, 513])
def test_elite_queries_need_a_bounded_window(bad: int | None) -> None:
    message = f"elite_window needs max_observation_tokens from 2 to 512, got {bad}"
    with pytest.raises(ValueError, match=message):
        parse(experimental={"elite_window": 0.9}, max_observation_tokens=bad)
    engines = parse(experimental={"elite_window": 0.9}, max_observation_tokens=64)
    with pytest.raises(ValueError, match=message):
        engines.for_request(request(kv_policy_options={"max_observation_tokens": bad}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threshold", 0),
        ("threshold", 1.01),
        ("recent_ratio", -0.01),
        ("max_observation_tokens", 0),
        ("pooling", 2),
        ("pooling", -3),
        ("uniform_mix", 1.01),
        ("min_layer_budget", 0),
    ],
)
def test_policy_parameter_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        parse(**{key: value})


def test_unknown_keys_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown KV compression setting") as error:
        parse(bugdet=0.1, budget=0.1, poling=3)
    message = str(error.value)
    assert "'bugdet', 'poling'" in message
    known = message.split("known for policy 'vlcache': ")[1].split(", ")
    assert known == sorted(set(EVERY_SETTING) - {"policy"})


def test_a_key_that_is_no_string_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"unknown KV compression setting.* 3;"):
        KVCompressConfig.from_dict({"policy": "vlcache", 3: 4})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["vl-cache", "VLCACHE", "", None, True, 1], ids=repr)
def test_unknown_policy_names_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match="unknown KV compression policy") as error:
        KVCompressConfig.from_dict({"policy": name})
    message = str(error.value)
    assert repr(name) in message
    assert message.endswith(f"known: none, {', '.join(POLICIES)}")


@pytest.mark.parametrize("name", [["vlcache"], {"name": "vlcache"}], ids=["list", "object"])
def test_policy_of_a_wrong_type(name: object) -> None:
    with pytest.raises(ValueError, match="unknown KV compression policy"):
        KVCompressConfig.from_dict({"policy": name})


def test_budget_beyond_the_range_of_floats() -> None:
    with pytest.raises(ValueError, match="budget"):
        parse(budget=10**400)


@pytest.mark.parametrize("values", [{"budget": 0.1}, {"policy": "none", "budget": 0.1}], ids=str)
def test_settings_while_off(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="KV compression is off") as error:
        KVCompressConfig.from_dict({**values, "pooling": 3})
    assert "budget, pooling" in str(error.value)
    assert str(error.value).endswith(f"Choose a policy: {', '.join(POLICIES)}")


@pytest.mark.parametrize("values", ["vlcache", ["vlcache"], 0.1, True], ids=repr)
def test_not_an_object(values: Any) -> None:
    with pytest.raises(ValueError, match="kv_compress must be a JSON object") as error:
        KVCompressConfig.from_dict(values)
    assert repr(values) in str(error.value)


CONFIGS = st.builds(
    KVCompressConfig,
    policy=st.builds(
        VLCachePolicy,
        threshold=st.floats(1e-6, 1.0),
        recent_ratio=st.floats(0.0, 1.0),
        max_observation_tokens=st.none() | st.integers(1, 10**6),
        pooling=st.integers(0, 50).map(lambda half: 2 * half + 1),
        uniform_mix=st.floats(0.0, 1.0),
        min_layer_budget=st.floats(1e-6, 1.0),
    ),
    budget=st.floats(1e-6, 1.0),
    when=st.just("pressure"),
    output_reserve=st.booleans(),
    min_prompt_tokens=st.integers(0, 10**6),
    pressure=st.builds(PressureConfig, high=st.floats(0.5, 1.0), low=st.floats(0.0, 0.5)),
    trace=st.builds(
        TraceConfig, path=st.text(max_size=20), positions=st.booleans(), scores=st.booleans()
    ),
    experimental=st.builds(ExperimentalOptions, diversity=st.floats(0.0, 1.0)),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CONFIGS)
def test_round_trips(config: KVCompressConfig) -> None:
    values = config.to_dict()
    assert KVCompressConfig.from_dict(values) == config
    assert KVCompressConfig.from_dict(json.loads(json.dumps(values))) == config
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)


def test_settings_tell_configurations_apart() -> None:
    """They go into sets (the spec's merge) and hashes (the compile cache)."""
    base = KVCompressConfig.from_dict(EVERY_SETTING)
    changed = {
        "budget": 0.3,
        "pressure.high": 0.7,
        "pressure.low": 0.4,
        "output_reserve": True,
        "min_prompt_tokens": 101,
        "trace.path": "/tmp/other.jsonl",
        "trace.positions": False,
        "trace.scores": False,
        "threshold": 0.03,
        "recent_ratio": 0.3,
        "max_observation_tokens": 51,
        "experimental.elite_window": 0.8,
        "experimental.diversity": 0.6,
        "pooling_2d": False,
        "sink_tokens": 0,
        "min_kept_tokens": 32,
        "keep_text": False,
        "pooling": 5,
        "uniform_mix": 0.7,
        "min_layer_budget": 0.06,
    }
    variants = set()
    for key, value in changed.items():
        settings = copy.deepcopy(EVERY_SETTING)
        group, _, name = key.rpartition(".")
        (settings[group] if group else settings)[name] = value
        variants.add(KVCompressConfig.from_dict(settings))
    assert len(variants) == len(changed)
    assert base not in variants


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        KVCompressConfig().budget = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("budget", "prompt_blocks", "expected"),
    [
        (0.1, 10, 1),  # never 2
        (0.1, 11, 2),
        (0.1, 1, 1),
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.14, 50, 7),  # 0.14 * 50 is 7.000000000000001
        (0.28, 25, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),  # 0.57 * 100 is 56.99999999999999
        (1.0, 17, 17),
        (0.999, 17, 17),
        (0.5, 1, 1),
        (0.05, 20, 1),
        (0.1, 0, 0),
    ],
)
def test_kept_blocks(budget: float, prompt_blocks: int, expected: int) -> None:
    assert parse(budget=budget).kept_blocks(prompt_blocks, 16) == expected


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.integers(1, 6).flatmap(
        lambda digits: st.integers(1, 10**digits).map(lambda n: Fraction(n, 10**digits))
    ),
    st.one_of(st.integers(1, 200), st.integers(1, 100_000)),
)
@example(Fraction(1, 10), 10)
@example(Fraction(57, 100), 100)
def test_kept_blocks_is_exact(budget: Fraction, prompt_blocks: int) -> None:
    """The budget is the decimal that the user wrote, not the nearest binary fraction."""
    literal = f"{budget.numerator * 10**6 // budget.denominator / 10**6:.6f}"
    assert Fraction(literal) == budget
    kept = parse(budget=float(literal)).kept_blocks(prompt_blocks, 16)
    assert kept == ceil(budget * prompt_blocks)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-6, 1.0), st.integers(1, 5000), st.integers(0, 500))
def test_kept_blocks_bounds(budget: float, prompt_blocks: int, more: int) -> None:
    """At least one block, never more than there are, and never fewer for a longer prompt."""
    config = KVCompressConfig(budget=budget)
    kept = config.kept_blocks(prompt_blocks, 16)
    assert 1 <= kept <= prompt_blocks
    assert kept <= config.kept_blocks(prompt_blocks + more, 16)


@pytest.mark.parametrize(("minimum", "expected"), [(0, 1), (16, 1), (17, 2), (64, 4), (160, 10)])
def test_kept_blocks_of_a_minimum_of_tokens(minimum: int, expected: int) -> None:
    assert parse(budget=0.1, min_kept_tokens=minimum).kept_blocks(10, 16) == expected
    assert parse(budget=1.0, min_kept_tokens=minimum).kept_blocks(10, 16) == 10


def test_kept_blocks_of_a_tiny_budget() -> None:
    assert KVCompressConfig(budget=1e-10).kept_blocks(4, 16) == 1


def test_settings_of_a_vllm_config() -> None:
    def settings_in(additional: object) -> KVCompressConfig | None:
        return get_kv_compress_config(SimpleNamespace(additional_config=additional))

    assert settings_in({ADDITIONAL_CONFIG_KEY: EVERY_SETTING}) == KVCompressConfig.from_dict(
        EVERY_SETTING
    )
    assert settings_in({}) is None
    assert settings_in({"other": 1}) is None
    assert settings_in({ADDITIONAL_CONFIG_KEY: None}) is None
    assert settings_in(object()) is None  # vLLM also accepts any hashable object
    with pytest.raises(ValueError, match="must be a JSON object"):
        settings_in({ADDITIONAL_CONFIG_KEY: "vlcache"})


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_description_lists_every_setting_with_its_default(name: str) -> None:
    """A policy's settings are those of every policy, of the policy it is alike, and its own."""
    described: dict[str, dict[str, Any]] = {}
    also: dict[str, str | None] = {}
    title = ""
    for line in describe_settings().splitlines():
        if match := re.fullmatch(r"- ([\w.]+) \(default (.+?)\): .+", line):
            described[title][match[1]] = json.loads(match[2])
        else:
            match = re.fullmatch(r"- (?:POLICY )?([\w -]+?)(?:, otherwise as ([\w-]+))?:", line)
            assert match is not None, line
            title = match[1]
            also[title] = match[2]
            described[title] = {}
    assert set(described) == {"EVERY POLICY", *POLICIES}
    defaults = KVCompressConfig(policy=POLICIES[name]()).flat()
    found = described["EVERY POLICY"] | described.get(also[name], {}) | described[name]
    assert found == {
        k: v for k, v in defaults.items() if k not in ("policy", "budget", "when", "every", "text")
    }


def test_a_request_without_settings_has_the_engines() -> None:
    config = parse()
    assert config.for_request(None) is config
    for params in (request(), SamplingParams(extra_args={}), request(other=1)):
        assert config.for_request(params) is config


def test_a_requests_own_settings() -> None:
    config = parse(pooling=5, trace={"path": "t", "positions": True})
    assert config.for_request(request(kv_budget=0.25)) == replace(config, budget=0.25)
    assert config.for_request(request(kv_budget=1)) == replace(config, budget=1.0)
    changed = replace(config, policy=replace(config.policy, max_observation_tokens=50))
    options = {"max_observation_tokens": 50}
    assert config.for_request(request(kv_policy_options=options)) == changed
    assert config.for_request(request(kv_policy_options=json.dumps(options))) == changed
    both = config.for_request(request(kv_budget=0.5, kv_policy_options=options))
    assert both == replace(changed, budget=0.5)
    assert config.for_request(request(kv_evict_every=512)) == replace(config, every=512)
    bounded = replace(config, every=512)
    assert bounded.for_request(request(kv_evict_every=None)) == config
    assert bounded.for_request(request(kv_budget=0.1)) == bounded


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"keep_text": True}, "keep_text"),
        ({"pooling": 3, "pooling_2d": True}, "pooling_2d"),
        ({"experimental": {"diversity": 0.5}}, "experimental.diversity"),
        (
            {"experimental": {"elite_window": 0.5}, "max_observation_tokens": 9},
            "experimental.elite_window",
        ),
    ],
    ids=str,
)
def test_what_needs_the_tokens_of_a_prompt_cannot_be_evicted_again(
    settings: dict[str, Any], named: str
) -> None:
    parse(**settings)
    with pytest.raises(ValueError, match=f"cannot be evicted again .* with {named}, which need"):
        parse(every=100, **settings)


def test_a_requests_own_experimental_options(warnings: list[str]) -> None:
    """They change the engine's one by one, under their current and their old names."""
    config = parse(experimental={"diversity": 0.5}, max_observation_tokens=64)
    changed = replace(config, experimental=replace(config.experimental, diversity=0.2))
    given = {"experimental": {"diversity": 0.2}}
    for options in (given, json.dumps(given)):
        assert config.for_request(request(kv_policy_options=options)) == changed
    assert not warnings
    for options in ({"diversity": 0.2}, '{"diversity": 0.2}'):
        assert config.for_request(request(kv_policy_options=options)) == changed
    old = "KV compression: deprecated settings: diversity is now experimental.diversity"
    assert warnings == [old]
    elite = {"elite_window": 0.9, "pooling": 3}
    assert config.for_request(request(kv_policy_options=elite)) == replace(
        config,
        policy=replace(config.policy, pooling=3),
        experimental=replace(config.experimental, elite_window=0.9),
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kv_budget": 7}, "kv_budget must be greater than 0 and at most 1, got 7.0"),
        ({"kv_budget": 0}, "kv_budget must be greater than 0 and at most 1, got 0.0"),
        ({"kv_budget": float("nan")}, "kv_budget must be "),
        ({"kv_budget": "0.25"}, "kv_budget must be of type float, got '0.25'"),
        ({"kv_budget": None}, "kv_budget must be of type float, got None"),
        ({"kv_budget": [0.1]}, "kv_budget must be of type float"),
        ({"kv_evict_every": 0}, "every must be at least 1 token or null, got 0"),
        ({"kv_evict_every": 0.5}, "kv_evict_every must be of type int or null, got 0.5"),
        (
            {"kv_evict_every": 9, "kv_policy_options": {"keep_text": True}},
            "cannot be evicted again (--kv-compress-every, kv_evict_every) with keep_text",
        ),
        ({"kv_policy_options": "{"}, "kv_policy_options is not valid JSON"),
        ({"kv_policy_options": "[1]"}, "kv_policy_options must be an object"),
        ({"kv_policy_options": 3}, "kv_policy_options must be an object"),
        ({"kv_policy_options": {"budget": 0.1}}, "unknown kv_policy_options: 'budget'; known for"),
        ({"kv_policy_options": {"pooling": 4}}, "pooling must be an odd number"),
        ({"kv_policy_options": {"pooling": "3"}}, "pooling must be of type int, got '3'"),
        ({"kv_policy_options": {"trace_path": "t"}}, "unknown kv_policy_options: 'trace_path'"),
        ({"kv_policy_options": {"trace": {}}}, "unknown kv_policy_options: 'trace'"),
        ({"kv_policy_options": {"experimental": 1}}, "experimental must be an object, got 1"),
        ({"kv_policy_options": {"diversity": 2.0}}, "diversity must be in [0, 1], got 2.0"),
    ],
    ids=str,
)
def test_bad_settings_of_a_request(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse().for_request(request(**extra))
