# SPDX-License-Identifier: Apache-2.0
"""Generators of seeded requests whose samples are discarded, over a stand-in for V1's runner."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vl_cache_vllm.worker import generators
from vl_cache_vllm.worker.generators import RewindableGenerator

VOCABULARY = 7


class Runner:
    """As much of V1's runner as samples, and sets generators back as `_bookkeeping_sync` does."""

    def __init__(self, *seeds: int | None) -> None:
        names = [f"request {row}" for row in range(len(seeds))]
        self.requests: dict[str, Any] = {
            name: SimpleNamespace(generator=seeded(seed))
            for name, seed in zip(names, seeds, strict=True)
        }
        self.input_batch = SimpleNamespace(
            req_ids=names,
            num_reqs=len(names),
            generators={
                row: self.requests[name].generator
                for row, name in enumerate(names)
                if self.requests[name].generator is not None
            },
        )
        # Longer than the batch, and stale there, as vLLM's buffer is.
        self.discard_request_mask: Any = SimpleNamespace(np=np.ones(len(names) + 3, dtype=bool))

    def _sample(self, logits: None, spec_decode_metadata: None) -> dict[int, torch.Tensor]:
        return {row: draw(generator) for row, generator in self.input_batch.generators.items()}

    def step(self, *discarded: int) -> dict[int, torch.Tensor]:
        """Samples of the rows with a seed; those of ``discarded`` rows do not count."""
        mask = self.discard_request_mask.np
        mask[: self.input_batch.num_reqs] = False
        mask[list(discarded)] = True
        samples = self._sample(None, None)
        for row in np.nonzero(mask[: self.input_batch.num_reqs])[0]:
            generator = self.input_batch.generators.get(int(row))
            if generator is not None:
                generator.set_offset(generator.get_offset() - 4)
        return samples


def seeded(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def draw(generator: torch.Generator | None) -> torch.Tensor:
    """What vLLM draws for a row, with and without top-k and top-p; and with drafts."""
    return torch.cat(
        [
            torch.empty(VOCABULARY).exponential_(generator=generator),
            torch.randint(0, 2**31, (1,), generator=generator).float(),
            torch.empty(3, dtype=torch.float64).uniform_(generator=generator).float(),
            torch.randn(1, generator=generator),  # keeps its second number in the state
        ]
    )


def attached(*seeds: int | None) -> Runner:
    runner = Runner(*seeds)
    generators.install(runner)
    return runner


def test_torch_cannot() -> None:
    """The fault; a torch that can makes all this superfluous."""
    with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
        Runner(3).step(0)


@pytest.mark.parametrize("num_discarded", [0, 1, 2, 5])
def test_discarded_samples_leave_no_trace(num_discarded: int) -> None:
    runner, expected = attached(3), seeded(3)
    for _ in range(num_discarded):
        runner.step(0)
    for _ in range(3):
        assert torch.equal(runner.step()[0], draw(expected))


def test_each_request_of_a_batch_by_itself() -> None:
    """Seeded ones of which some are discarded, one without a seed, and two of the same seed."""
    runner = attached(3, None, 4, 3)
    expected = {0: seeded(3), 2: seeded(4), 3: seeded(3)}
    for discarded in ((0, 1, 2, 3), (0, 1, 2), (2,), (), (0, 3), ()):
        samples = runner.step(*discarded)
        assert samples.keys() == expected.keys()
        for row in expected.keys() - set(discarded):
            assert torch.equal(samples[row], draw(expected[row])), (discarded, row)


def test_a_preempted_request_returns_where_it_was() -> None:
    """It leaves the batch, returns into another row, and reads its prompt in chunks once more."""
    runner, expected = attached(3), seeded(3)
    runner.step(0)
    assert torch.equal(runner.step()[0], draw(expected))
    batch, generator = runner.input_batch, runner.requests["request 0"].generator
    batch.req_ids, batch.num_reqs = ["another", "request 0"], 2
    batch.generators = {1: generator}
    runner.step(0, 1)
    runner.step(1)
    assert torch.equal(runner.step()[1], draw(expected))
    assert runner.requests["request 0"].generator is batch.generators[1] is generator


def test_only_who_is_discarded_is_touched() -> None:
    runner = attached(3, 4)
    before = dict(runner.input_batch.generators)
    runner.step()
    assert runner.input_batch.generators == before
    runner.step(0)
    assert isinstance(runner.input_batch.generators[0], RewindableGenerator)
    assert runner.input_batch.generators[1] is before[1]


def test_steps_without_seeds_cost_nothing() -> None:
    runner = attached(None, None)
    runner.discard_request_mask = None
    assert runner._sample(None, None) == {}


def test_other_runners_are_left_alone() -> None:
    attached(3)
    with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
        Runner(3).step(0)


def test_a_mark_serves_once() -> None:
    """A runner that sets a generator back which nobody marked would repeat its numbers."""
    generator = RewindableGenerator.after(torch.Generator().manual_seed(3))
    with pytest.raises(RuntimeError, match="no mark"):
        generator.set_offset(0)
    generator.mark()
    generator.set_offset(-4)
    with pytest.raises(RuntimeError, match="no mark"):
        generator.set_offset(-4)
