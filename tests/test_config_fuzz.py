# SPDX-License-Identifier: Apache-2.0
"""Whatever a user sends is a configuration that can be carried out, or an error that names it."""

import argparse
import json
import math
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import examples
from vl_cache_vllm import cli, deprecated
from vl_cache_vllm.config import ADDITIONAL_CONFIG_KEY, WHEN, KVCompressConfig
from vl_cache_vllm.policy import POLICIES

REQUEST_KEYS = ("kv_budget", "kv_evict_every", "kv_policy_options")
NAMES = sorted(POLICIES)
CONFIGS = [KVCompressConfig(POLICIES[name]()) for name in NAMES]
KEYS = sorted({key for config in CONFIGS for key in (*config.to_dict(), *deprecated.SETTINGS)})
PLACES = sorted({key for config in CONFIGS for key in config.flat()})  # in nested objects, too
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([10**6 + 1, 2**63, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 1),
    st.sampled_from([5e-324, 1e-320, -0.0, sys.float_info.max]),
)
WORDS = st.sampled_from(["", "null", "0.1", "nan", "1e999", *NAMES, *WHEN]) | st.text(max_size=5)
JSON: st.SearchStrategy = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from([*KEYS, *(place.split(".")[-1] for place in PLACES)]) | st.text(max_size=3),
        inner,
        max_size=2,
    ),
    max_leaves=4,
)
SETTINGS = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3)


def is_sound(config: KVCompressConfig) -> None:
    """It has the types it claims, survives every way of travelling, and keeps some blocks."""
    values = config.flat()
    defaults = KVCompressConfig(policy=type(config.policy)()).flat()
    assert values.keys() == defaults.keys()
    for key, value in values.items():
        if isinstance(defaults[key], bool):
            assert isinstance(value, bool), key
        elif isinstance(defaults[key], float):
            assert type(value) is float and math.isfinite(value), key
        elif value is not None and defaults[key] is not None:
            assert type(value) is type(defaults[key]), key
        else:
            assert type(value) in (type(None), int, float, str), key
    assert KVCompressConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and hash(copy) == hash(config)
    assert all(1 <= config.kept_blocks(n, 16) <= n for n in (1, 2, 7, 1000))
    for first, tokens in ((0, 9), (4, 9), (8, 9)):
        assert 0 <= config.policy.observation_start(first, tokens) < tokens


def refuses(error: ValueError, *keys: str) -> None:
    """The message names one of the keys, or what it is called now."""
    assert type(error) is ValueError, repr(error)
    message = str(error)
    names = (*keys, *(deprecated.SETTINGS[key] for key in keys if key in deprecated.SETTINGS))
    assert message and any(name in message for name in names), message


@examples(150)
@given(
    name=st.sampled_from(NAMES),
    key=st.sampled_from([key for key in (*PLACES, *deprecated.SETTINGS) if key != "policy"]),
    value=st.sampled_from([0, 1, 0.5, False, True]) | JSON,
)
def test_one_setting(name: str, key: str, value: Any) -> None:
    group, _, inner = key.rpartition(".")
    try:
        config = KVCompressConfig.from_dict(
            {"policy": name, **({group: {inner: value}} if group else {key: value})}
        )
    except ValueError as error:
        refuses(error, key)
    else:
        assert config is not None
        is_sound(config)
        place = deprecated.SETTINGS.get(key, key)
        if place in deprecated.WITHOUT_EFFECT and place not in config.flat():
            return
        taken = config.flat()[place]
        assert taken == value and isinstance(taken, bool) == isinstance(value, bool)


@examples(200)
@given(settings=SETTINGS, name=st.sampled_from(NAMES) | JSON)
def test_several_settings(settings: dict[str, Any], name: Any) -> None:
    settings = {"policy": name} | settings
    try:
        config = KVCompressConfig.from_dict(settings)
    except ValueError as error:
        refuses(error, *settings)
    else:
        assert (config is None) == (settings == {"policy": "none"})
        if config is not None:
            is_sound(config)


@examples(100)
@given(JSON.filter(lambda value: value is not None and not isinstance(value, dict)))
def test_settings_that_are_no_object(value: Any) -> None:
    with pytest.raises(ValueError, match=ADDITIONAL_CONFIG_KEY):
        KVCompressConfig.from_dict(value)


@examples(100)
@given(key=st.text() | st.integers() | st.none(), value=JSON)
def test_unknown_settings(key: Any, value: Any) -> None:
    if key in KEYS:
        return
    with pytest.raises(ValueError, match="unknown KV compression setting") as error:
        KVCompressConfig.from_dict({"policy": "vlcache", key: value})
    assert repr(key) in str(error.value)


OPTIONS = JSON | SETTINGS
EXTRA = st.fixed_dictionaries(
    {},
    optional={
        "kv_budget": JSON | st.floats(0, 1),
        "kv_policy_options": OPTIONS | OPTIONS.map(json.dumps) | WORDS,
        "other": JSON,
    },
)


@examples(200)
@given(name=st.sampled_from(NAMES), extra=EXTRA)
@example("vlcache", {"kv_policy_options": "[" * 100_000})
@example("vlcache", {"kv_policy_options": '{"pooling": NaN}'})
def test_a_requests_own_settings(name: str, extra: dict[str, Any]) -> None:
    base = KVCompressConfig(policy=POLICIES[name]())
    try:
        config = base.for_request(SimpleNamespace(extra_args=extra))  # type: ignore[arg-type]
    except ValueError as error:
        options = extra.get("kv_policy_options")
        if isinstance(options, str):
            try:
                options = json.loads(options)
            except (ValueError, RecursionError):
                options = None
        given_keys = options if isinstance(options, dict) else ()
        refuses(error, *(key for key in extra if key != "other"), *given_keys)
        return
    is_sound(config)
    given_ours = [key for key in extra if key != "other"]
    assert given_ours or config is base
    if "kv_budget" in extra:
        assert config.budget == extra["kv_budget"] and extra["kv_budget"] is not True
    elif "kv_policy_options" in extra:
        assert config.budget == base.budget


FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "--kv-compress": st.sampled_from(NAMES) | WORDS,
        "--kv-compress-budget": WORDS | NUMBERS.map(str),
        "--kv-compress-when": WORDS,
        "--kv-compress-config": (JSON | SETTINGS).map(json.dumps) | WORDS,
    },
)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return cli.add_cli_args(argparse.ArgumentParser(exit_on_error=False))


@examples(150)
@given(flags=FLAGS, text=st.booleans())
def test_flags(parser: argparse.ArgumentParser, flags: dict[str, str], text: bool) -> None:
    given_flags = [f"{name}={value}" for name, value in flags.items()]
    try:
        args = parser.parse_args([*given_flags, *["--kv-compress-text"] * text])
    except argparse.ArgumentError as error:
        assert error.argument_name in flags
        return
    options = getattr(args, "kv_compress_config", {})
    try:
        cli.move_flags_to_additional_config(args)
    except ValueError as error:
        refuses(error, *options, "policy", "budget", "when", "text")
        return
    settings = getattr(args, "additional_config", {}).get(ADDITIONAL_CONFIG_KEY)
    config = KVCompressConfig.from_dict(settings)
    assert (config is None) == (flags.get("--kv-compress", "none") == "none")
    if config is not None:
        is_sound(config)
        assert config.text == text
