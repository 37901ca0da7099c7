# SPDX-License-Identifier: Apache-2.0
"""Random generators of seeded requests on CPU that V1's model runner can rewind.

Every step of a chunked prefill samples a token, and only the token of the last step is used. For
each other step vLLM (`GPUModelRunner._bookkeeping_sync`) rewinds the request's generator by the
offset of one sample on a GPU. A CPU generator has no offset, so the engine would end with
``CPU Generator does not use offset``. V2's runner derives random numbers from seed and position.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class RewindableGenerator(torch.Generator):
    """A CPU generator that can return to a mark."""

    _mark: torch.Tensor | None = None  # uint8, about 5 KB

    @classmethod
    def after(cls, original: torch.Generator) -> "RewindableGenerator":
        """A generator that continues from the state of ``original``."""
        generator = cls()
        generator.set_state(original.get_state())
        return generator

    def mark(self) -> None:
        """Remember the state that the next `set_offset` returns to."""
        self._mark = self.get_state()

    def get_offset(self) -> int:
        """Always 0: what vLLM subtracts from it says nothing about a CPU generator."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Return to the mark, once, whatever the offset.

        Raises:
            RuntimeError: if there is no mark.
        """
        if self._mark is None:
            raise RuntimeError("this generator has no mark to return to")
        self.set_state(self._mark)
        self._mark = None
        return self


def install(runner: Any) -> None:
    """Let a V1 model runner on CPU rewind the generators of seeded requests."""
    runner._sample = RewindingSampler(runner).sample


class RewindingSampler:
    """Marks the generators whose next sample the runner will discard.

    A generator is replaced by one that can be marked when that happens first. Steps without seeded
    requests cost nothing, and a generator's state is copied only where a sample is discarded.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner
        self._sample = runner._sample

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's ``_sample``, after the generators of discarded samples were marked."""
        if self._runner.input_batch.generators:
            self._mark()
        return self._sample(*args, **kwargs)

    def _mark(self) -> None:
        runner = self._runner
        batch, generators = runner.input_batch, runner.input_batch.generators
        for row in np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist():
            generator = generators.get(row)
            if generator is None:
                continue
            if not isinstance(generator, RewindableGenerator):
                generator = RewindableGenerator.after(generator)
                # The sampler reads this dictionary; a preempted request returns with the other.
                generators[row] = runner.requests[batch.req_ids[row]].generator = generator
            generator.mark()
