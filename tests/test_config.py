# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted, what each refusal says, and the arithmetic of the budget."""

import json
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

from vl_cache_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    DEFAULT_BUDGET,
    KVCompressConfig,
    describe_settings,
    get_kv_compress_config,
)
from vl_cache_vllm.policy import POLICIES
from vl_cache_vllm.policy.vlcache import VLCachePolicy

EVERY_SETTING = {
    "policy": "vlcache",
    "budget": 0.25,
    "when": "pressure",
    "pressure_high": 0.8,
    "pressure_low": 0.5,
    "output_reserve": False,
    "text": False,
    "min_prompt_tokens": 100,
    "trace_path": "/tmp/trace.jsonl",
    "trace_positions": True,
    "trace_scores": True,
    "threshold": 0.02,
    "recent_ratio": 0.2,
    "max_observation_tokens": 50,
    "post_vision_only": False,
    "sink_tokens": 4,
    "keep_text": True,
    "elite_window": 0.9,
    "diversity": 0.5,
    "pooling": 3,
    "pooling_2d": True,
    "uniform_mix": 0.8,
    "shared_scores": 0.5,
    "lookahead": 40.0,
    "lookahead_share": 0.25,
    "short_lookahead": 2.0,
    "min_layer_budget": 0.05,
}


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
    assert (config.when, config.pressure_high, config.pressure_low) == ("always", 0.9, 0.7)
    assert config.min_prompt_tokens == 0
    assert config.output_reserve
    assert config.trace_path is None
    assert config.trace_positions is config.trace_scores is False


def test_every_setting_is_parsed() -> None:
    config = KVCompressConfig.from_dict(EVERY_SETTING)
    assert config == KVCompressConfig(
        policy=VLCachePolicy(
            threshold=0.02,
            recent_ratio=0.2,
            max_observation_tokens=50,
            post_vision_only=False,
            sink_tokens=4,
            keep_text=True,
            elite_window=0.9,
            diversity=0.5,
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
        pressure_high=0.8,
        pressure_low=0.5,
        output_reserve=False,
        min_prompt_tokens=100,
        trace_path="/tmp/trace.jsonl",
        trace_positions=True,
        trace_scores=True,
    )
    assert config is not None
    assert set(config.to_dict()) == set(EVERY_SETTING)


def test_parsing_leaves_the_settings_alone() -> None:
    values = dict(EVERY_SETTING)
    KVCompressConfig.from_dict(values)
    assert values == EVERY_SETTING


def test_integers_pass_as_floats() -> None:
    config = parse(budget=1, uniform_mix=0)
    assert config.budget == 1.0
    assert isinstance(config.budget, float)
    assert isinstance(config.policy, VLCachePolicy)
    assert isinstance(config.policy.uniform_mix, float)


def test_null_where_it_means_something() -> None:
    config = parse(trace_path=None, max_observation_tokens=None)
    assert config.trace_path is None
    assert config.policy.max_observation_tokens is None


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
        ("trace_path", 1, "null or str"),
        ("trace_path", False, "null or str"),
        ("trace_positions", 1, "bool"),
        ("trace_positions", "true", "bool"),
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
    with pytest.raises(ValueError, match=f"^{key} must be of type {expected_type}, got ") as error:
        parse(**{key: value})
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
        KVCompressConfig(pressure_high=high, pressure_low=low)


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
        parse(pressure_high=0.5, pressure_low=0.2)


def test_pressure_thresholds_may_be_equal() -> None:
    config = parse(when="pressure", pressure_high=0.5, pressure_low=0.5)
    assert config.pressure_high == config.pressure_low


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
    pressure_high=st.floats(0.5, 1.0),
    pressure_low=st.floats(0.0, 0.5),
    output_reserve=st.booleans(),
    min_prompt_tokens=st.integers(0, 10**6),
    trace_path=st.text(max_size=20),
    trace_positions=st.booleans(),
    trace_scores=st.booleans(),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CONFIGS)
def test_round_trips(config: KVCompressConfig) -> None:
    values = config.to_dict()
    assert KVCompressConfig.from_dict(values) == config
    assert KVCompressConfig.from_dict(json.loads(json.dumps(values))) == config
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert hash(copy) == hash(config)


def test_settings_tell_configurations_apart() -> None:
    """They go into sets (the spec's merge) and hashes (the compile cache)."""
    base = KVCompressConfig.from_dict(EVERY_SETTING)
    changed = {
        "budget": 0.3,
        "pressure_high": 0.7,
        "pressure_low": 0.4,
        "output_reserve": True,
        "min_prompt_tokens": 101,
        "trace_path": "/tmp/other.jsonl",
        "trace_positions": False,
        "trace_scores": False,
        "threshold": 0.03,
        "recent_ratio": 0.3,
        "max_observation_tokens": 51,
        "elite_window": 0.8,
        "diversity": 0.6,
        "pooling_2d": False,
        "sink_tokens": 0,
        "keep_text": False,
        "pooling": 5,
        "uniform_mix": 0.7,
        "min_layer_budget": 0.06,
    }
    variants = {KVCompressConfig.from_dict({**EVERY_SETTING, k: v}) for k, v in changed.items()}
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
    assert parse(budget=budget).kept_blocks(prompt_blocks) == expected


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
    assert parse(budget=float(literal)).kept_blocks(prompt_blocks) == ceil(budget * prompt_blocks)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-6, 1.0), st.integers(1, 5000), st.integers(0, 500))
def test_kept_blocks_bounds(budget: float, prompt_blocks: int, more: int) -> None:
    """At least one block, never more than there are, and never fewer for a longer prompt."""
    config = KVCompressConfig(budget=budget)
    kept = config.kept_blocks(prompt_blocks)
    assert 1 <= kept <= prompt_blocks
    assert kept <= config.kept_blocks(prompt_blocks + more)


def test_kept_blocks_of_a_tiny_budget() -> None:
    assert KVCompressConfig(budget=1e-10).kept_blocks(4) == 1


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
        if match := re.fullmatch(r"- (\w+) \(default (.+?)\): .+", line):
            described[title][match[1]] = json.loads(match[2])
        else:
            match = re.fullmatch(r"- (?:POLICY )?([\w -]+?)(?:, otherwise as ([\w-]+))?:", line)
            assert match is not None, line
            title = match[1]
            also[title] = match[2]
            described[title] = {}
    assert set(described) == {"EVERY POLICY", *POLICIES}
    defaults = KVCompressConfig(policy=POLICIES[name]()).to_dict()
    found = described["EVERY POLICY"] | described.get(also[name], {}) | described[name]
    assert found == {
        k: v for k, v in defaults.items() if k not in ("policy", "budget", "when", "text")
    }


def test_a_request_without_settings_has_the_engines() -> None:
    config = parse()
    for extra in (None, {}, {"other": 1}):
        assert config.for_request(extra) is config


def test_a_requests_own_settings() -> None:
    config = parse(pooling=5, trace_path="t", trace_positions=True)
    assert config.for_request({"kv_budget": 0.25}) == replace(config, budget=0.25)
    assert config.for_request({"kv_budget": 1}) == replace(config, budget=1.0)
    changed = replace(config, policy=replace(config.policy, max_observation_tokens=50))
    options = {"max_observation_tokens": 50}
    assert config.for_request({"kv_policy_options": options}) == changed
    assert config.for_request({"kv_policy_options": json.dumps(options)}) == changed
    both = config.for_request({"kv_budget": 0.5, "kv_policy_options": options})
    assert both == replace(changed, budget=0.5)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kv_budget": 7}, "kv_budget must be greater than 0 and at most 1, got 7.0"),
        ({"kv_budget": 0}, "kv_budget must be greater than 0 and at most 1, got 0.0"),
        ({"kv_budget": float("nan")}, "kv_budget must be "),
        ({"kv_budget": "0.25"}, "kv_budget must be of type float, got '0.25'"),
        ({"kv_budget": None}, "kv_budget must be of type float, got None"),
        ({"kv_budget": [0.1]}, "kv_budget must be of type float"),
        ({"kv_policy_options": "{"}, "kv_policy_options is not valid JSON"),
        ({"kv_policy_options": "[1]"}, "kv_policy_options must be an object"),
        ({"kv_policy_options": 3}, "kv_policy_options must be an object"),
        ({"kv_policy_options": {"budget": 0.1}}, "unknown kv_policy_options: 'budget'; known for"),
        ({"kv_policy_options": {"pooling": 4}}, "pooling must be an odd number"),
        ({"kv_policy_options": {"pooling": "3"}}, "pooling must be of type int, got '3'"),
    ],
    ids=str,
)
def test_bad_settings_of_a_request(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse().for_request(extra)
