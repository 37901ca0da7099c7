# SPDX-License-Identifier: Apache-2.0
"""Two rankings, by the last query and by the maximum over queries, and how they are mixed."""

from typing import Any

import pytest
import torch

from vl_cache_vllm.ops.look_ahead import look_ahead
from vl_cache_vllm.policy import POLICIES, Attention, Prompt
from vl_cache_vllm.policy.scoring import interleave
from vl_cache_vllm.policy.vlcache_plus import VLCachePlusPolicy

PROMPT = Prompt(60, ((5, 50),))


def attention_of(seed: int = 0, tokens: int = 60) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    last = torch.rand(2, 3, tokens, generator=generator) ** 6
    return Attention(last, torch.maximum(last, torch.rand(2, 3, tokens, generator=generator) ** 4))


def rankings(
    attention: torch.Tensor, shared: float, part: float
) -> list[tuple[torch.Tensor, float]]:
    """Sinks muted, shared over all heads, then two look-aheads."""
    attention = attention.clone()
    attention[..., 0] = 0
    common = (attention**2).mean((0, 1)).sqrt()
    scores = (1 - shared) * attention + shared * common
    return [(look_ahead(scores, 1.0), 0.25 * part), (look_ahead(scores, 80.0), 0.75 * part)]


def test_preset() -> None:
    policy = VLCachePlusPolicy()
    assert POLICIES["vlcache-plus"] is VLCachePlusPolicy
    assert policy.wants_maxima
    assert policy.summed_queries == 1
    assert policy.sink_tokens == 1
    assert policy.observation_start(100, 400) == 400 - 64
    weights = policy.layer_weights(torch.tensor([0.9, 0.1]).double(), 0.1, Prompt(100))
    assert weights[0] == weights[1]


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_rankings_are_interleaved(share: float) -> None:
    attention = attention_of()
    assert attention.maxima is not None
    scores = VLCachePlusPolicy(maxima_share=share).token_scores(attention.with_common(), PROMPT)
    of_maxima = rankings(attention.maxima, 0.9, share)
    expected = interleave(rankings(attention.sums, 0.55, 1 - share) + of_maxima)
    torch.testing.assert_close(scores, expected)


def test_share_falls_with_the_attention_of_the_last_query() -> None:
    maxima = torch.zeros(2, 2, 60)
    maxima[0, 1, 10], maxima[1, 0, 20] = 0.6, 0.8
    maxima[..., 0] = maxima[..., 55] = 1.0  # a sink and a text token: they do not count

    def share(last: torch.Tensor, prompt: Prompt = PROMPT) -> float:
        common = Attention(last, maxima).with_common()
        assert common.common_sums is not None and common.common_maxima is not None
        return float(
            VLCachePlusPolicy.share_of_maxima(common.common_sums, common.common_maxima, prompt)
        )

    assert share(maxima) == pytest.approx(0.1)
    assert share(0.75 * maxima) == pytest.approx(0.25)
    assert share(0.5 * maxima) == pytest.approx(0.5)
    assert share(0 * maxima) == pytest.approx(0.9)
    # Without visual tokens, as with --kv-compress-text, all tokens count.
    assert share(0.4 * maxima, Prompt(60)) == pytest.approx(0.6)


def test_scores_of_all_ranks_together() -> None:
    """Each rank sees some of the KV heads; the mean over ranks is passed in."""
    attention = attention_of()
    assert attention.maxima is not None
    number = attention.sums.shape[1]
    ranks = [
        Attention(attention.sums[:, i : i + 1], attention.maxima[:, i : i + 1])
        for i in range(number)
    ]
    squares: list[torch.Tensor] = []
    for rank in ranks:
        rank.with_common(lambda own: squares.append(own) or own)  # type: ignore[func-returns-value]
    whole = VLCachePlusPolicy().token_scores(attention.with_common(), PROMPT)
    for i, rank in enumerate(ranks):
        own = rank.with_common(lambda _: sum(squares) / number)  # type: ignore[arg-type]
        scores = VLCachePlusPolicy().token_scores(own, PROMPT)
        torch.testing.assert_close(scores, whole[:, i : i + 1])


def test_layers_are_scored_in_groups() -> None:
    attention = attention_of().with_common()
    whole = VLCachePlusPolicy().token_scores(attention, PROMPT)
    for layer in range(len(whole)):
        part = slice(layer, layer + 1)
        alone = VLCachePlusPolicy().token_scores(
            attention.of_layers(part), PROMPT.of_layers(part, len(whole))
        )
        assert torch.equal(alone, whole[part])


def test_sinks_do_not_rank() -> None:
    """Their attention raises neither their own score nor that of the tokens after them."""
    attention = attention_of()
    loud, quiet = (
        Attention(attention.sums.clone(), attention.maxima.clone())  # type: ignore[union-attr]
        for _ in range(2)
    )
    for one, value in ((loud, 50.0), (quiet, 0.0)):
        one.sums[..., :2] = one.maxima[..., :2] = value  # type: ignore[index]
    loud, quiet = loud.with_common(), quiet.with_common()
    policy = VLCachePlusPolicy(sink_tokens=2)
    assert torch.equal(policy.token_scores(loud, PROMPT), policy.token_scores(quiet, PROMPT))
    one = VLCachePlusPolicy(sink_tokens=1)
    assert not torch.equal(one.token_scores(loud, PROMPT), one.token_scores(quiet, PROMPT))
    groups = policy.precedence(PROMPT, torch.device("cpu"))
    assert groups is not None
    assert groups.tolist() == [2, 2] + [0] * 58


def test_inputs_are_not_changed() -> None:
    attention = attention_of()
    copy = attention_of()
    VLCachePlusPolicy().token_scores(attention.with_common(), PROMPT)
    assert torch.equal(attention.sums, copy.sums)
    assert attention.maxima is not None and copy.maxima is not None
    assert torch.equal(attention.maxima, copy.maxima)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shared_maxima": 1.1}, r"shared_maxima must be in \[0, 1\], got 1.1"),
        ({"maxima_share": 0.0}, r"maxima_share must be in \(0, 1\] or null, got 0.0"),
        ({"lookahead": -1.0}, "lookahead must be from 0"),
    ],
)
def test_settings_out_of_range(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLCachePlusPolicy(**parameters)
