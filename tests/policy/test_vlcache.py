# SPDX-License-Identifier: Apache-2.0
"""The formulae of paper.md sections 1 to 3 and this project's two parameters."""

from typing import Any

import pytest
import torch

from vl_cache_vllm.ops.look_ahead import look_ahead
from vl_cache_vllm.policy import POLICIES, Attention, EvictionPolicy, Prompt
from vl_cache_vllm.policy.scoring import interleave
from vl_cache_vllm.policy.vlcache import VLCachePolicy


def naive_weights(
    density: list[float], budget: float, uniform_mix: float = 0.0, lower: float = 0.01
) -> list[float]:
    """Algorithm 1, layer by layer."""
    num_layers, total = len(density), sum(density)
    weights = []
    for d in density:
        share = (1 - uniform_mix) * d / total + uniform_mix / num_layers
        weights.append(min(max(share * budget * num_layers, lower), 1.0))
    return weights


def weights_of(policy: VLCachePolicy, density: list[float], budget: float) -> torch.Tensor:
    return policy.layer_weights(torch.tensor(density, dtype=torch.float64), budget, Prompt(100))


def scored(policy: VLCachePolicy, attention: torch.Tensor) -> torch.Tensor:
    return policy.token_scores(Attention(attention).with_common(), Prompt(attention.shape[-1]))


DENSITIES = pytest.mark.parametrize(
    "density",
    [
        pytest.param([0.62, 0.99, 0.52, 0.04], id="paper.md-section-6"),
        pytest.param([0.5], id="one-layer"),
        pytest.param([1.0, 1e-6, 1e-6], id="one-dense-layer"),
        pytest.param([0.3] * 7, id="equal"),
        pytest.param([1e-9, 2e-9, 4e-9], id="sparse-everywhere"),
    ],
)
BUDGETS = pytest.mark.parametrize("budget", [0.01, 0.1, 0.4, 1.0])


def test_defaults_are_the_paper() -> None:
    policy = VLCachePolicy()
    assert policy.name == "vlcache"
    assert policy.threshold == 0.01
    assert policy.recent_ratio == 0.1
    assert policy.max_observation_tokens is None
    assert policy.post_vision_only
    assert (policy.pooling, policy.uniform_mix, policy.min_layer_budget) == (1, 0.0, 0.01)
    assert (policy.shared_scores, policy.lookahead, policy.short_lookahead) == (0.0, 0.0, 0.0)
    attention = torch.rand(2, 3, 50)
    assert torch.equal(scored(policy, attention), attention)
    assert POLICIES["vlcache"] is VLCachePolicy


@DENSITIES
@BUDGETS
@pytest.mark.parametrize("uniform_mix", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("lower", [1e-4, 0.01, 0.3])
def test_layer_weights(
    density: list[float], budget: float, uniform_mix: float, lower: float
) -> None:
    policy = VLCachePolicy(uniform_mix=uniform_mix, min_layer_budget=lower)
    weights = weights_of(policy, density, budget)
    assert weights.dtype == torch.float64
    expected = naive_weights(density, budget, uniform_mix, lower)
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)


def test_layer_weights_of_the_worked_example() -> None:
    """d / sum(d) * alpha * L, then the clip to [0.01, 1]."""
    weights = weights_of(VLCachePolicy(), [0.6, 0.3, 0.099, 0.001], 0.5)
    assert weights.tolist() == pytest.approx([1.0, 0.6, 0.198, 0.01])


@BUDGETS
def test_only_relative_density_counts(budget: float) -> None:
    density = [0.62, 0.99, 0.52, 0.04]
    scaled = [d / 128 for d in density]
    one, other = (weights_of(VLCachePolicy(), d, budget) for d in (density, scaled))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@BUDGETS
def test_uniform_mix_of_one_ignores_density(budget: float) -> None:
    weights = weights_of(VLCachePolicy(uniform_mix=1.0), [0.62, 0.99, 0.52, 0.0], budget)
    assert weights.tolist() == pytest.approx([budget] * 4)
    assert len(set(weights.tolist())) == 1  # exactly equal, so that no layer wins by rounding


@BUDGETS
def test_nothing_dense_falls_back_to_uniform(budget: float) -> None:
    weights = weights_of(VLCachePolicy(), [0.0, 0.0, 0.0], budget)
    assert weights.tolist() == pytest.approx([max(budget, 0.01)] * 3)


def test_weights_are_positive_whatever_the_density() -> None:
    weights = weights_of(VLCachePolicy(min_layer_budget=1e-6), [1.0, 0.0, 0.0], 0.1)
    assert (weights > 0).all()


def test_token_scores_are_accumulated_attention() -> None:
    attention = torch.rand(3, 2, 63, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scored(VLCachePolicy(), attention), attention)


@pytest.mark.parametrize("pooling", [1, 3, 5, 63, 127])
@pytest.mark.parametrize("num_tokens", [1, 2, 63])
def test_pooling_averages_neighbours(pooling: int, num_tokens: int) -> None:
    attention = torch.rand(3, 2, num_tokens, generator=torch.Generator().manual_seed(1))
    scores = scored(VLCachePolicy(pooling=pooling), attention)
    assert scores.shape == attention.shape
    half = pooling // 2
    for layer in range(3):
        for head in range(2):
            row = attention[layer, head].tolist()
            for j in range(num_tokens):
                window = row[max(0, j - half) : j + half + 1]  # beyond the ends counts as zero
                expected = sum(window) / pooling
                assert scores[layer, head, j].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_shared_scores_are_root_mean_squares_over_layers_and_heads(share: float) -> None:
    attention = torch.rand(2, 3, 50)
    scores = scored(VLCachePolicy(shared_scores=share), attention)
    shared = (sum(attention[i, j] ** 2 for i in range(2) for j in range(3)) / 6) ** 0.5
    torch.testing.assert_close(scores, (1 - share) * attention + share * shared)


def test_heads_that_hold_different_tokens_share_no_scores() -> None:
    attention = torch.rand(2, 3, 50)
    prompt = Prompt(50, lengths=torch.tensor([50, 50]))
    found = VLCachePolicy(shared_scores=0.5).token_scores(Attention(attention), prompt)
    assert torch.equal(found, attention)


def test_nothing_inherits_beyond_the_end_of_a_layer() -> None:
    """A layer in a longer row ranks its tokens as if it were alone."""
    policy = VLCachePolicy(pooling=3, lookahead=20.0, lookahead_share=0.6, short_lookahead=2.0)
    attention = torch.rand(2, 3, 50)
    attention[1, :, 30:] = 0
    prompt = Prompt(50, lengths=torch.tensor([50, 30]))
    found = policy.token_scores(Attention(attention), prompt)
    for layer, length in enumerate((50, 30)):
        alone = scored(policy, attention[layer : layer + 1, :, :length])
        ranks = found[layer : layer + 1, :, :length].argsort(-1, descending=True)
        assert torch.equal(ranks, alone.argsort(-1, descending=True))
    assert (found[1, :, 30:].amax(-1) <= found[1, :, :30].amin(-1)).all()


def test_lookahead_ranks_a_share_of_the_tokens() -> None:
    attention = torch.rand(2, 3, 50)
    pooled = scored(VLCachePolicy(pooling=3), attention)
    policy = VLCachePolicy(pooling=3, lookahead=4.0, lookahead_share=0.3)
    expected = interleave([(pooled, 0.7), (look_ahead(pooled, 4.0), 0.3)])
    assert torch.equal(scored(policy, attention), expected)


def test_short_lookahead_ranks_the_rest() -> None:
    attention = torch.rand(2, 3, 50)
    short = look_ahead(attention, 2.0)
    assert torch.equal(
        scored(VLCachePolicy(short_lookahead=2.0), attention),
        short,
    )
    policy = VLCachePolicy(lookahead=9.0, lookahead_share=0.6, short_lookahead=2.0)
    expected = interleave([(short, 0.4), (look_ahead(attention, 9.0), 0.6)])
    assert torch.equal(scored(policy, attention), expected)


def test_short_lookahead_keeps_the_successor_of_a_weak_token() -> None:
    """A strong token's long run must not take the place of a weak one's next token."""
    attention = torch.full((1, 1, 200), 1e-6)
    attention[..., 10], attention[..., 150] = 1.0, 0.1

    def kept(**parameters: float) -> set[int]:
        policy = VLCachePolicy(lookahead=60.0, lookahead_share=0.75, **parameters)
        return set(scored(policy, attention)[0, 0].topk(40).indices.tolist())

    assert 150 in kept()
    assert 151 not in kept()
    assert {10, 11, 30, 150, 151} <= kept(short_lookahead=1.0)


def test_pooling_does_not_mix_layers_or_heads() -> None:
    attention = torch.zeros(2, 2, 9)
    attention[0, 1, 4] = 1.0
    scores = scored(VLCachePolicy(pooling=3), attention)
    assert scores[0, 1].tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0])
    assert not scores[0, 0].any()
    assert not scores[1].any()


def test_policy_does_not_change_its_inputs() -> None:
    attention, density = torch.rand(2, 2, 9), torch.rand(2, dtype=torch.float64)
    copies = attention.clone(), density.clone()
    policy = VLCachePolicy(pooling=3, uniform_mix=0.5)
    scored(policy, attention)
    policy.layer_weights(density, 0.1, Prompt(100))
    assert torch.equal(attention, copies[0])
    assert torch.equal(density, copies[1])


@pytest.mark.parametrize(
    ("limit", "vision_end", "prefill_tokens", "expected"),
    [
        pytest.param(None, 40, 63, 40, id="all-post-vision"),
        pytest.param(50, 40, 63, 40, id="limit-larger-than-text"),
        pytest.param(23, 40, 63, 40, id="limit-equals-text"),
        pytest.param(22, 40, 63, 41, id="limit-smaller-than-text"),
        pytest.param(1, 40, 63, 62, id="last-query-only"),
    ],
)
def test_observation_start(
    limit: int | None, vision_end: int, prefill_tokens: int, expected: int
) -> None:
    policy = VLCachePolicy(max_observation_tokens=limit)
    assert policy.observation_start(vision_end, prefill_tokens) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        pytest.param(None, 0, id="all-queries"),
        pytest.param(32, 31, id="window-over-visual-tokens"),
        pytest.param(5, 58, id="window-within-the-text"),
        pytest.param(100, 0, id="window-longer-than-the-prompt"),
    ],
)
def test_observation_start_of_any_modality(limit: int | None, expected: int) -> None:
    policy = VLCachePolicy(post_vision_only=False, max_observation_tokens=limit)
    assert policy.observation_start(40, 63) == expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        pytest.param({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0", id="p-zero"),
        pytest.param({"threshold": 1.5}, "threshold must be in", id="p-above-one"),
        pytest.param({"threshold": float("nan")}, "threshold must be in", id="p-nan"),
        pytest.param({"recent_ratio": -0.1}, r"recent_ratio must be in \[0, 1\]", id="recent-low"),
        pytest.param({"recent_ratio": 1.1}, r"recent_ratio must be in \[0, 1\]", id="recent-high"),
        pytest.param({"max_observation_tokens": 0}, "at least 1 or null, got 0", id="observe-none"),
        pytest.param({"shared_scores": 1.1}, r"shared_scores must be in \[0, 1\]", id="shared"),
        pytest.param({"lookahead": -1.0}, "lookahead must be from 0", id="lookahead-negative"),
        pytest.param({"lookahead": 2e6}, "lookahead must be from 0", id="lookahead-huge"),
        pytest.param({"short_lookahead": -1.0}, "short_lookahead must be from 0", id="short"),
        pytest.param(
            {"lookahead_share": -0.1}, r"lookahead_share must be in \[0, 1\]", id="inherited"
        ),
        pytest.param({"pooling": 2**31 + 1}, "pooling must be at most 1e6", id="pooling-huge"),
        pytest.param({"pooling": 0}, "pooling must be an odd number", id="pooling-zero"),
        pytest.param({"pooling": 2}, "pooling must be an odd number.*got 2", id="pooling-even"),
        pytest.param({"pooling": -1}, "pooling must be an odd number", id="pooling-negative"),
        pytest.param({"uniform_mix": -0.1}, r"uniform_mix must be in \[0, 1\]", id="mix-low"),
        pytest.param({"uniform_mix": 1.1}, r"uniform_mix must be in \[0, 1\]", id="mix-high"),
        pytest.param({"min_layer_budget": 0.0}, "min_layer_budget must be in", id="clip-zero"),
        pytest.param({"min_layer_budget": 1.1}, "min_layer_budget must be in", id="clip-above-one"),
    ],
)
def test_parameters_out_of_range(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLCachePolicy(**parameters)


def test_limits_themselves_are_accepted() -> None:
    VLCachePolicy(threshold=1.0, recent_ratio=0.0, uniform_mix=1.0, min_layer_budget=1.0)
    VLCachePolicy(recent_ratio=1.0, uniform_mix=0.0, max_observation_tokens=1)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        pytest.param({}, None, id="all-alike"),
        pytest.param({"sink_tokens": 2}, [2, 2, 0, 0, 0, 0, 0, 0], id="sinks"),
        pytest.param({"keep_text": True}, [1, 0, 0, 1, 0, 0, 1, 1], id="text"),
        pytest.param({"keep_text": True, "sink_tokens": 2}, [2, 2, 0, 1, 0, 0, 1, 1], id="both"),
        pytest.param({"sink_tokens": 99}, [2] * 8, id="more-sinks-than-tokens"),
    ],
)
def test_precedence(parameters: dict[str, Any], expected: list[int] | None) -> None:
    policy = VLCachePolicy(**parameters)
    groups = policy.precedence(Prompt(8, ((1, 3), (4, 6))), torch.device("cpu"))
    assert (None if groups is None else groups.tolist()) == expected


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_registry_is_consistent(name: str) -> None:
    policy_cls = POLICIES[name]
    assert issubclass(policy_cls, EvictionPolicy)
    assert policy_cls.name == name
    assert policy_cls() == policy_cls()
    assert hash(policy_cls()) == hash(policy_cls())
