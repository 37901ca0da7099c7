# SPDX-License-Identifier: Apache-2.0
"""Policies are found through entry points; what is wrong with one is said when it is asked for."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch

from vl_cache_vllm.config import KVCompressConfig, describe_settings
from vl_cache_vllm.policy import POLICIES, Attention, EvictionPolicy, Prompt, setting
from vl_cache_vllm.policy.registry import GROUP, Registry


@dataclass(frozen=True)
class Newest(EvictionPolicy):
    """A third party's policy."""

    name: ClassVar[str] = "newest"

    strength: float = setting(1.0, "how much newer counts")

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        return self.strength * torch.arange(attention.shape[-1]).expand_as(attention)


def registry(**entries: str) -> Registry:
    return Registry(EntryPoint(name, value, GROUP) for name, value in entries.items())


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Make entries look installed beside this project's."""

    def install(**entries: str) -> None:
        for name, value in entries.items():
            monkeypatch.setitem(POLICIES._entries, name, [EntryPoint(name, value, GROUP)])

    return install


def test_ours_are_found_the_same_way() -> None:
    assert set(POLICIES) == {
        "vlcache",
        "vlcache-plus",
        "snapkv",
        "pyramidkv",
        "h2o",
        "streamingllm",
        "random",
    }
    for name, policy in POLICIES.items():
        assert policy.name == name
        policy()  # defaults are valid


def test_a_third_partys_policy(installed) -> None:
    installed(newest=f"{__name__}:Newest")
    config = KVCompressConfig.from_dict({"policy": "newest", "strength": 2, "budget": 0.3})
    assert config is not None and config.policy == Newest(strength=2.0)
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    assert (
        "\n- POLICY newest:\n- strength (default 1.0): how much newer counts" in describe_settings()
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Policy", "cannot be loaded: ModuleNotFoundError: No module named"),
        (f"{__name__}:Missing", "cannot be loaded: AttributeError: "),
        ("json:dumps", r"is no subclass of vl_cache_vllm\.policy\.EvictionPolicy"),
        ("json:JSONDecoder", r"is no subclass of vl_cache_vllm\.policy\.EvictionPolicy"),
        (f"{__name__}:Newest", "whose class variable `name` is 'mine'"),
    ],
)
def test_a_broken_policy_is_refused_when_chosen(installed, value: str, message: str) -> None:
    installed(mine=value)
    with pytest.raises(ValueError, match=message):
        KVCompressConfig.from_dict({"policy": "mine"})
    # ... and harms nobody else.
    assert KVCompressConfig.from_dict({"policy": "vlcache"}) is not None
    assert (
        "\n- POLICY mine: KV compression policy 'mine' of an unknown package" in describe_settings()
    )


def test_unknown_and_ambiguous_names() -> None:
    entries = registry(newest=f"{__name__}:Newest")
    assert entries["newest"] is Newest
    assert "newest" in entries and "other" not in entries and len(entries) == 1
    with pytest.raises(KeyError):
        entries["other"]
    twice = Registry([EntryPoint("newest", f"{__name__}:Newest", GROUP)] * 2)
    with pytest.raises(ValueError, match="offered by more than one package"):
        twice["newest"]
