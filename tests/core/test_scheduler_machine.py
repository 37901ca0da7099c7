# SPDX-License-Identifier: Apache-2.0
"""Random histories of a whole engine but for its model.

vLLM's real schedulers with our additions, driven like an engine core drives them, workers that
run our device side on pages of labels (`tests.helpers.simulated_workers`), and an executable
model that predicts every row, reference count, prefix hit, failed allocation, decision and order.

`pytest --hypothesis-profile=soak` tries many more histories, with new seeds.
"""

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.conftest import histories
from tests.helpers.blocks import STOP_TOKEN, image_prompt, make_kv_cache_config, make_request
from tests.helpers.pools import PAGE_ORDERS
from tests.helpers.schedulers import Scheduler, Setup, make_scheduler
from tests.helpers.simulated_workers import (
    FREE,
    GROUP,
    NUM_LAYERS,
    Labels,
    SimulatedWorker,
    V1Worker,
    V2Worker,
    of_layer,
)
from vl_cache_vllm.config import KVCompressConfig, PressureConfig
from vl_cache_vllm.core.admission import Skip
from vl_cache_vllm.messages import EvictionOrder, take_deferred, take_orders
from vl_cache_vllm.policy import EvictionPolicy
from vl_cache_vllm.policy.h2o import H2OPolicy
from vl_cache_vllm.policy.snapkv import SnapKVPolicy
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.policy.vlcache_plus import VLCachePlusPolicy
from vl_cache_vllm.worker.step import BatchRow

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
MAX_NUM_TOKENS = 64
GENERATED = 7  # the one token that answers consist of, so that they share prefixes too
WRONG = 8  # a draft token that is never right

POLICIES = (
    VLCachePolicy(),
    VLCachePolicy(max_observation_tokens=1),
    VLCachePolicy(max_observation_tokens=3),
    SnapKVPolicy(max_observation_tokens=5),
    H2OPolicy(),
    VLCachePolicy(evict_after=5),
    VLCachePlusPolicy(min_kept_tokens=0, evict_after=2),
)


@dataclass(frozen=True)
class Wish:
    """What a user asks for."""

    before: int
    image: int
    name: str
    after: int
    variant: int
    max_tokens: int
    stop_after: int  # tokens of the answer, with the one that ends it
    budget: str | None  # the request's own
    window: int | None  # its own max_observation_tokens
    modality: str
    resumable: bool
    priority: int
    every: int | None  # its own kv_evict_every; 0: none of its own


WISHES = st.builds(
    Wish,
    before=st.sampled_from([4, 4, 0, 1, 5]),  # often alike, so that they share prefixes
    image=st.sampled_from([13, 13, 13, 8, 3, 22, 0]),
    name=st.sampled_from(["cat", "cat", "cat", "dog"]),
    after=st.sampled_from([9, 18, 11]) | st.integers(0, 24),
    variant=st.sampled_from([0, 0, 0, 1]),
    max_tokens=st.sampled_from([60, 9, 2, 1]),
    stop_after=st.sampled_from([99, 99, 5, 1]),
    budget=st.sampled_from([None] * 5 + ["0.5", "1", "0.01"]),
    window=st.sampled_from([None] * 5 + [1, 2, 50]),
    modality=st.sampled_from(["image"] * 7 + ["audio"]),
    resumable=st.sampled_from([False] * 9 + [True]),
    priority=st.integers(0, 2),
    every=st.sampled_from([0] * 5 + [None, 1, 4, 6, 9]),
)
SCHEDULERS = st.sampled_from(
    [
        {},
        {"steps_in_flight": 2},
        {"is_async": True, "steps_in_flight": 2},
        {"num_drafts": 2},
    ]
)
SETTINGS = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "budget": st.sampled_from(["0.25", "0.1", "0.34", "0.5", "0.75", "1"]),
        "when": st.sampled_from(["always", "pressure"]),
        "marks": st.sampled_from([("0.9", "0.7"), ("0.6", "0.4"), ("0.4", "0.2")]),
        "text": st.booleans(),
        "min_prompt_tokens": st.sampled_from([0, 24, 0]),
        "output_reserve": st.sampled_from([True, True, False]),
        "every": st.sampled_from([None, None, 4, 7, 12]),
    }
)


@dataclass(frozen=True)
class Bound:
    """Of a request that is evicted again."""

    start: int  # tokens from which it counts if the prompt was not evicted
    growth: int  # blocks from one eviction to the next
    num_kept: int  # M

    @property
    def most(self) -> int:
        return self.num_kept + self.growth + 1


@dataclass(frozen=True)
class Due:
    """An eviction of a request that decodes, if it is scheduled."""

    trigger: str
    tokens: int  # E
    num_kept: int  # M
    is_early: bool = False


@dataclass(eq=False)
class Expected:
    """What the model knows of one request since its prefill (re)started."""

    request: Request
    prompt_tokens: int
    num_prompt: int  # N
    num_kept: int  # M of the end of its prefill; 0: not evicted then
    skip: Skip | None
    num_possible: int  # M under pressure
    observed_from: int
    budget: Fraction
    every: int | None
    num_blocks: int = 0  # of the row, freed ones too
    is_decided: bool = False
    bound: Bound | None = None
    # Of the last eviction.
    evicted: int = 0  # E; 0: none
    kept: tuple[int, ...] = ()  # blocks
    num_freed: int = 0  # columns of the row
    # Of a first eviction that waits for the answer to begin.
    evict_at: int = 0  # tokens; 0: it does not wait
    reserved: tuple[int, ...] = ()  # blocks that it will keep
    # Until their steps are processed, for each eviction: the number of processed tokens from which
    # on its blocks are freed, E, and the kept blocks of the eviction before.
    to_free: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    first_evicted: int = 0  # E of the first: from here on nothing more is hashed
    hashed: int = 0  # tokens that may have been hashed before
    had_stale_output: bool = False  # of steps before a preemption, after it
    has_no_room: bool = False  # the whole pool does not hold what its bound keeps beside it

    @property
    def num_held(self) -> int:
        """Blocks, with those that an eviction has replaced."""
        others = len(self.kept) + len(self.replaced) + len(self.reserved)
        return self.num_blocks - self.num_freed + others

    @property
    def replaced(self) -> tuple[int, ...]:
        """Kept blocks of earlier evictions that are not free yet."""
        return tuple(block for _, _, blocks in self.to_free for block in blocks)

    @property
    def num_allowed(self) -> int | None:
        """The most blocks that the bound allows; None: no bound."""
        if self.bound is None or self.has_no_room:
            return None
        most = self.bound.num_kept + self.bound.growth + 1
        if self.to_free or not self.kept:
            # The prefill itself holds more, after a preemption with generated tokens.
            whole = max(
                self.num_prompt,
                self.bound.start // BLOCK_SIZE + self.bound.growth,
                cdiv(self.evict_at, BLOCK_SIZE),
            )
            most = max(most, whole + 1)
        most += len(self.reserved)
        return most + (len(self.kept) + len(self.replaced) if self.to_free else 0)


@dataclass(frozen=True)
class Answer:
    """How an evicted request goes on."""

    num_kept: int
    tokens: int  # behind what is evicted
    coming: int
    most: int  # blocks that are counted at most
    period: int  # tokens between later evictions; 0: there are none

    def blocks(self, moment: int) -> int:
        """After so many more tokens."""
        if moment > self.coming:
            return 0
        tokens = self.tokens + moment
        while self.period and tokens > self.period:
            tokens -= self.period
        now = self.tokens
        while self.period and now > self.period:
            now -= self.period
        now = self.num_kept + cdiv(now, BLOCK_SIZE)
        return min(self.num_kept + cdiv(tokens, BLOCK_SIZE), max(now, self.most))


def ceil_share(share: Fraction, number: int) -> int:
    return min(number, ceil(share * number))


class SchedulerMachine(RuleBasedStateMachine):
    """One KV cache group."""

    seen: ClassVar[Counter[str]]  # what happened in all examples together; set by the test
    others: ClassVar[tuple[KVCacheGroupSpec, ...]] = ()
    least_blocks: ClassVar[int] = 18  # the longest request and the null block

    @initialize(
        num_blocks=st.sampled_from([0, 1, 4]) | st.integers(0, 32),
        settings=SETTINGS,
        scheduler=SCHEDULERS,
        use_v2=st.booleans(),
        by_priority=st.booleans(),
        must_fit=st.booleans(),
        encoder_tokens=st.sampled_from([1000, 25]),
        max_num_seqs=st.sampled_from([8, 3]),
        page_order=st.sampled_from(PAGE_ORDERS),
    )
    def start(
        self,
        num_blocks: int,
        settings: dict[str, Any],
        scheduler: dict[str, Any],
        page_order: str,
        **flags: Any,
    ) -> None:
        num_blocks += self.least_blocks
        self.settings = settings
        self.by_pressure = settings["when"] == "pressure"
        self.text = settings["text"] and settings["policy"].for_text
        self.high, self.low = map(Fraction, settings["marks"])
        plain = {name: value for name, value in settings.items() if name != "marks"}
        plain |= {"budget": float(settings["budget"]), "text": self.text}
        if self.by_pressure:
            plain["pressure"] = PressureConfig(float(self.high), float(self.low))
        self.config = KVCompressConfig(**plain)
        self.setup = Setup(
            BLOCK_SIZE, MAX_MODEL_LEN, max_num_tokens=MAX_NUM_TOKENS, **flags, **scheduler
        )
        self.scheduler: Scheduler = make_scheduler(
            self.setup,
            make_kv_cache_config(self.config, num_blocks, BLOCK_SIZE, NUM_LAYERS, self.others),
        )
        self.manager = self.scheduler._eviction_manager
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.usable = num_blocks - 1
        self.labels = Labels()
        self.workers = self.make_workers(num_blocks, page_order)
        self.wishes: dict[str, Wish] = {}  # by request id
        self.expected: dict[str, Expected] = {}
        self.observed: dict[object, list[int]] = {}  # by a worker's state of a request
        self.tokens: dict[str, list[int]] = {}  # as a sampler knows them
        self.drafts: dict[str, list[int]] = {}
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.of_hash: dict[Any, list[int]] = {}  # the labels that a cached block must hold
        self.cached_elsewhere: dict[str, set[int]] = {}  # indices of blocks, by request
        self.promised: dict[str, set[int]] = {}  # blocks that get their hash in a step, by request
        self.num_added = 0
        self.num_evicted = 0
        self.num_skipped: Counter[Skip] = Counter()
        self.num_freed = 0
        self.num_evictions: Counter[str] = Counter()  # by trigger
        self.num_freed_tokens = 0
        self.due: dict[str, Due] = {}
        # Of the step that is being scheduled.
        self.orders: dict[str, EvictionOrder] = {}
        self.counted: dict[str, tuple[str, bool, int]] = {}  # trigger, first, freed tokens
        self.deferred: list[str] = []
        self.waited: dict[str, bool] = {}  # whether the eviction of this step was deferred
        self.order_of_decision: dict[str, int] = {}
        self.num_decided = 0
        self.answers: list[Fraction] = []  # complete ones, as shares of their longest
        self.reported: Counter[str] = Counter()
        self.watch()

    def num_ahead(self, expected: Expected) -> int:
        """Blocks beyond a bound of tokens that drafts and steps in flight bring.

        These blocks are much smaller than any engine's: otherwise it is none.
        """
        tokens = 2 * self.setup.num_drafts + self.setup.steps_in_flight + 1
        if expected.had_stale_output:  # nobody knew how many of its tokens were processed
            tokens += self.setup.steps_in_flight + 1
        return cdiv(tokens, BLOCK_SIZE) - 1

    def make_workers(self, num_blocks: int, page_order: str) -> list[SimulatedWorker]:
        windows = [group.kv_cache_spec for group in self.others]
        arguments = (self.setup, self.config, num_blocks, self.labels, page_order, windows)
        if self.setup.use_v2:
            return [V2Worker(*arguments)]
        last = V1Worker(*arguments)
        if self.setup.is_async or self.setup.steps_in_flight == 1:
            return [last]
        return [last, V1Worker(*arguments, is_last_stage=False)]

    def watch(self) -> None:
        """See what the scheduler asks for, and what it is told."""
        cache = self.scheduler.kv_cache_manager
        hit, allocate, free = (
            self.scheduler._get_local_prefix_cache_hit,
            cache.allocate_slots,
            cache.free,
        )
        take_stats, cache_blocks = self.manager.take_stats, self.manager.cache_blocks
        plan_later = self.manager.plan_later_evictions
        self.scheduler._get_local_prefix_cache_hit = lambda r: self.check_hit(r, hit(r))
        cache.allocate_slots = lambda *args, **kwargs: self.check_allocation(
            allocate, *args, **kwargs
        )

        def freed(request: Request) -> None:
            self.learn(request)
            self.cached_elsewhere.pop(request.request_id, None)
            # vLLM keeps hashes of blocks that a victim of this very step will never fill.
            self.pool.evict_blocks(self.promised.pop(request.request_id, set()))
            expected = self.expected.pop(request.request_id, None)
            self.seen["preempt evicted"] += bool(
                expected and expected.num_freed and not request.is_finished()
            )
            self.due.pop(request.request_id, None)
            self.seen["order withdrawn"] += self.orders.pop(request.request_id, None) is not None
            self.counted.pop(request.request_id, None)
            if request.request_id in self.deferred:
                self.deferred.remove(request.request_id)
            if expected and expected.reserved and request.is_finished():
                self.num_skipped[Skip.SHORT_OUTPUT] += 1
                self.seen["skip short_output"] += 1
            if expected and expected.evicted:
                share = Fraction(request.num_output_tokens, request.max_tokens)
                self.answers += [share] * request.is_finished()
            free(request)

        def reported() -> Any:
            stats = take_stats()
            if stats is not None:
                self.reported["evicted"] += stats.evicted
                self.reported.update({f"by {name}": n for name, n in stats.evictions.items()})
                self.reported["freed"] += stats.freed_blocks
                self.reported.update({f"skip {name}": n for name, n in stats.skipped.items()})
            return stats

        def cached(request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
            start = self.manager.num_cached_block.get(request.request_id, 0)
            hashes = request.block_hashes[: num_tokens // BLOCK_SIZE]
            elsewhere = {
                n
                for n, block_hash in enumerate(hashes)
                if n >= start and self.pool.get_cached_block(block_hash, [GROUP])
            }
            self.seen["cached elsewhere"] += bool(elsewhere)
            self.cached_elsewhere.setdefault(request.request_id, set()).update(elsewhere)
            cache_blocks(request, num_tokens, *args, **kwargs)

        def planned(*args: Any) -> None:
            self.due = self.expected_due()
            plan_later(*args)
            found = {
                request_id: Due(
                    later.trigger.value, later.evicted_tokens, later.kept_blocks, later.is_early
                )
                for request_id, later in self.manager.later.due.items()
            }
            assert found == self.due

        cache.free = freed
        self.manager.plan_later_evictions = planned
        self.manager.take_stats = reported
        self.manager.cache_blocks = cached

    # Requests come and go.

    @precondition(lambda self: len(self.scheduler.requests) < 10)
    @rule(wish=WISHES, reuses_id=st.booleans())
    def add_request(self, wish: Wish, reuses_id: bool) -> None:
        busy = {i for output, _ in self.in_flight for i in output.num_scheduled_tokens}
        free_ids = [i for i in self.wishes if i not in self.scheduler.requests and i not in busy]
        request_id = f"request-{self.num_added}"
        if reuses_id and free_ids:
            request_id = free_ids[0]
            self.seen["id reused"] += 1
        if self.setup.num_drafts:  # vLLM miscounts where a piece's answer ends among drafts
            wish = replace(wish, resumable=False)
        self.num_added += 1
        self.wishes[request_id] = wish
        extra_args: dict[str, Any] = {"other": 1}
        if wish.every != 0:
            extra_args["kv_evict_every"] = wish.every
        if wish.budget is not None:
            extra_args["kv_budget"] = float(wish.budget)
        if wish.window is not None:
            extra_args["kv_policy_options"] = {"max_observation_tokens": wish.window}
        prompt = image_prompt(wish.before, wish.image, wish.after, wish.variant) or [1]
        request = make_request(
            request_id,
            prompt,
            [(wish.before, wish.image, f"{wish.name}-{wish.image}")] if wish.image else [],
            block_size=BLOCK_SIZE,
            max_tokens=wish.max_tokens,
            resumable=wish.resumable,
            modality=wish.modality,
            extra_args=extra_args,
            priority=wish.priority,
            arrival_time=float(self.num_added),
        )
        self.scheduler.add_request(request)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.scheduler.requests))))
        self.seen["abort"] += 1

    def finish(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    # A step with drafts is one call of the engine, which nothing but aborts interrupts.
    @precondition(
        lambda self: self.scheduler.running and not (self.setup.num_drafts and self.in_flight)
    )
    @rule()
    def reset(self) -> None:
        """Of the prefix cache, which preempts everyone."""
        for request in [*self.streaming(), *self.scheduler.kv_holding_waiting]:
            self.finish(request.request_id)  # vLLM cannot take away what these hold
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.seen["reset"] += 1

    @precondition(lambda self: self.streaming())
    @rule(after=st.sampled_from([1, 9, 18]), goes_on=st.sampled_from([True, True, False]))
    def stream_on(self, after: int, goes_on: bool) -> None:
        """More of a prompt that comes in pieces."""
        request = self.streaming()[0]
        if request.num_tokens + after + 2 > MAX_MODEL_LEN:
            return self.finish(request.request_id)
        self.scheduler.add_request(
            make_request(
                request.request_id,
                image_prompt(0, 0, after),
                block_size=BLOCK_SIZE,
                max_tokens=9,
                resumable=goes_on,
            )
        )
        wish = self.wishes[request.request_id]
        if goes_on:  # with the later piece's parameters
            wish = replace(wish, max_tokens=9, budget=None, window=None, every=0)
        self.wishes[request.request_id] = wish
        self.seen["streamed on"] += goes_on

    def streaming(self) -> list[Request]:
        waits = RequestStatus.WAITING_FOR_STREAMING_REQ
        return [r for r in self.scheduler.requests.values() if r.status == waits]

    # Steps.

    @precondition(lambda self: self.may_schedule())
    @rule(max_tokens=st.just(MAX_NUM_TOKENS) | st.integers(3, MAX_NUM_TOKENS))
    def schedule_step(self, max_tokens: int) -> None:
        self.schedule(max_tokens)

    def may_schedule(self) -> bool:
        has_room = len(self.in_flight) < self.setup.steps_in_flight
        return has_room and self.scheduler.has_requests()

    def schedule(self, max_tokens: int = MAX_NUM_TOKENS) -> None:
        self.scheduler.max_num_scheduled_tokens = max_tokens  # any chunks, in any step
        self.promised.clear()
        load = self.check_pressure() if self.by_pressure else None
        output = self.scheduler.schedule()
        self.promised.clear()
        if load is not None:
            assert self.manager.decisions.pressure.is_on == load
        assert take_orders(output) == self.orders
        assert self.manager.take_orders() == {}, "taken once"
        assert take_deferred(output) == self.deferred
        assert self.manager.take_deferred() == [], "taken once"
        assert self.orders.keys() <= output.num_scheduled_tokens.keys()
        self.seen["two orders in a step"] += len(self.orders) > 1
        self.run(output)
        for trigger, is_first, freed_tokens in self.counted.values():
            self.num_evicted += is_first
            self.num_evictions[trigger] += 1
            self.num_freed_tokens += freed_tokens
        self.orders.clear()
        self.counted.clear()
        self.deferred.clear()

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete_step(self) -> None:
        self.complete()

    def complete(self) -> None:
        output, sampled = self.in_flight.popleft()
        stale = [self.scheduler.requests.get(i) for i in output.num_scheduled_tokens]
        self.seen["stale output"] += any(r and r.num_stale_output_tokens for r in stale)
        self.scheduler.update_from_output(output, sampled)
        if self.setup.num_drafts:
            drafts = {i: self.propose(i) for i in sampled.req_ids if i in self.scheduler.requests}
            self.scheduler.update_draft_token_ids(
                DraftTokenIds(list(drafts), list(drafts.values()))
            )

    def propose(self, request_id: str) -> list[int]:
        known = len(self.tokens[request_id])
        proposed = [WRONG if (known + j) % 3 == 0 else GENERATED for j in range(known % 4)]
        return proposed[: self.setup.num_drafts]

    @precondition(lambda self: self.scheduler.has_requests())
    @rule(
        num_steps=st.integers(2, 10),
        max_tokens=st.just(MAX_NUM_TOKENS) | st.integers(3, MAX_NUM_TOKENS),
    )
    def run_steps(self, num_steps: int, max_tokens: int) -> None:
        for _ in range(num_steps):
            self.advance(max_tokens)
            self.check_everything()

    def advance(self, max_tokens: int = MAX_NUM_TOKENS) -> None:
        """As an engine core: fill the queue of steps first."""
        if self.may_schedule():
            self.schedule(max_tokens)
            if self.in_flight[-1][0].num_scheduled_tokens and self.may_schedule():
                return
        if self.in_flight:
            self.complete()

    # Workers.

    def run(self, output: SchedulerOutput) -> None:
        """A step on the workers, at once: devices run steps in the order they are scheduled."""
        requests = self.scheduler.requests
        started = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        cached = output.scheduled_cached_reqs
        continued = list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id in [i for i, _ in started] + sorted(cached.resumed_req_ids):
            self.tokens[request_id] = list(requests[request_id].all_token_ids)
        self.drafts = output.scheduled_spec_decode_tokens
        self.poison()
        for worker in self.workers:
            rows, tables = worker.execute(
                output, requests, lambda i: self.tokens[i] + self.drafts.get(i, [])
            )
            assert {row.state.request_id for row in rows} == set(output.num_scheduled_tokens)
            for row in rows:
                self.check_row(row, requests[row.state.request_id])
            for group, table in enumerate(tables):
                for row, blocks in zip(rows, table, strict=True):
                    self.check_table(row.state.request_id, group, blocks)
            self.check_plan(worker, rows)
        sampled = []
        for request_id, computed in started + continued:
            end = computed + output.num_scheduled_tokens[request_id]
            sampled.append(self.sample(request_id, end, self.drafts.get(request_id, [])))
        ids = [request_id for request_id, _ in started + continued]
        self.in_flight.append(
            (output, ModelRunnerOutput(ids, {i: n for n, i in enumerate(ids)}, sampled))
        )

    def sample(self, request_id: str, end: int, drafts: list[int]) -> list[int]:
        """What the model says: its own tokens as far as they were drafted, and one more."""
        tokens = self.tokens[request_id]
        assert end <= len(tokens) + len(drafts)
        if end < len(tokens):
            return []
        prompt = self.scheduler.requests[request_id].num_prompt_tokens
        sampled = []
        for draft in [*drafts, None]:
            length = len(tokens) + len(sampled) + 1 - prompt
            stops = length >= self.wishes[request_id].stop_after
            sampled.append(STOP_TOKEN if stops else GENERATED)
            if sampled[-1] != draft:
                break
        self.seen["draft accepted"] += len(sampled) > 1
        self.seen["draft rejected"] += len(sampled) <= len(drafts)
        tokens += sampled
        for worker in self.workers:
            worker.sampled(request_id, sampled)
        return sampled

    def poison(self) -> None:
        """Blocks that are neither held nor cached lose what they had."""
        lost = [b.block_id for b in self.pool.blocks if not b.ref_cnt and b.block_hash is None]
        for worker in self.workers:
            worker.free([*lost, 0])

    def check_table(self, request_id: str, group: int, blocks: list[int]) -> None:
        """A worker never hears that blocks were freed."""
        held = self.rows(request_id)[group]
        assert len(blocks) == len(held)
        assert all(theirs in (0, ours) for theirs, ours in zip(held, blocks, strict=True))

    def check_row(self, row: BatchRow, request: Request) -> None:
        """Scheduler and worker agree about what was evicted."""
        expected, state = self.expected[request.request_id], row.state
        assert state.evicted_tokens == expected.evicted
        assert state.kept_blocks == len(expected.kept)

    def check_plan(self, worker: SimulatedWorker, rows: list[BatchRow]) -> None:
        """Whoever is ordered to be evicted is, all its queries observed."""
        step, evicted = worker.evictor.step, {}
        for observation in step.observations if step is not None else ():
            row, state = rows[observation.row], observation.state
            assert row.state is state
            num_queries = observation.query_end - observation.query_start
            first = observation.first_position
            if row.num_computed >= state.prefill_tokens:
                assert num_queries == 1 and state.request_id in self.orders
                self.seen["observed while it decodes"] += 1
                continue
            assert first + num_queries <= state.prefill_tokens
            self.observed.setdefault(state, []).extend(range(first, first + num_queries))
            self.seen["observed"] += 1
        for eviction in step.pending_evictions if step is not None else ():
            row, state = rows[eviction.row], eviction.state
            expected = self.expected[state.request_id]
            evicted[state.request_id] = eviction.order
            window = list(range(expected.observed_from, expected.prompt_tokens))
            if row.num_computed >= expected.prompt_tokens:
                assert eviction.tokens == row.num_computed + 1
                waited = self.waited[state.request_id]
                assert not waited or self.observed[state] == window
                assert eviction.num_queries == 1 + waited * len(window)
                assert eviction.unobserved == waited * (row.num_computed - expected.prompt_tokens)
                continue
            assert eviction.tokens == expected.prompt_tokens
            assert self.observed[state] == window
            self.seen["finished after chunks"] += row.num_scheduled < expected.prompt_tokens
        assert evicted == self.orders
        slots = [row.state.slot for row in rows]
        assert len(set(slots)) == len(slots)
        assert len(worker.evictor.requests) <= len(self.scheduler.requests)

    # The model: what each call must do.

    def begin(self, request: Request) -> Expected:
        """The rules of admission, written down once more, for the tokens known now."""
        wish = self.wishes[request.request_id]
        policy = self.config.policy
        is_visual = wish.image > 0 and wish.modality != "audio"
        vision_end = wish.before + wish.image if is_visual else None
        if vision_end is None and self.text and not request.mm_features:
            vision_end = 0
        tokens = request.num_tokens
        num_prompt = cdiv(tokens, BLOCK_SIZE)
        budget = Fraction(wish.budget or self.settings["budget"])
        num_kept = ceil_share(budget, num_prompt)
        every = self.settings["every"] if wish.every == 0 else wish.every
        skip = None
        if vision_end is None:
            skip = Skip.TEXT_ONLY
        elif request.resumable:
            skip = Skip.STREAMING_INPUT
        elif vision_end >= request.num_prompt_tokens:
            skip = Skip.NO_POST_VISION_TOKENS
        elif request.num_prompt_tokens < self.settings["min_prompt_tokens"]:
            skip = Skip.SHORT_PROMPT
        elif num_kept >= tokens // BLOCK_SIZE:
            skip = Skip.NO_SAVING
        elif num_prompt + num_kept + 1 + self.most_elsewhere(tokens + 1) > self.usable:
            skip = Skip.POOL_TOO_SMALL
        elif wish.max_tokens <= 1 + policy.evict_after:
            skip = Skip.NO_DECODE
        window = wish.window or policy.max_observation_tokens or tokens
        first = (vision_end or 0) if policy.post_vision_only else 0
        kept = 0 if skip else num_kept
        observed_from = max(first, tokens - window)
        return Expected(request, tokens, num_prompt, kept, skip, kept, observed_from, budget, every)

    def bound_of(self, expected: Expected) -> Bound | None:
        """Of a request whose prefill ends, or would end now."""
        never = {Skip.TEXT_ONLY, Skip.NO_DECODE, Skip.STREAMING_INPUT, Skip.POOL_TOO_SMALL}
        if expected.every is None or expected.budget == 1 or expected.skip in never:
            return None
        num_prompt = cdiv(expected.request.num_prompt_tokens, BLOCK_SIZE)
        growth = cdiv(expected.every, BLOCK_SIZE)
        num_kept = ceil_share(expected.budget, num_prompt + growth)
        return Bound(num_prompt * BLOCK_SIZE, growth, num_kept)

    def expected_due(self) -> dict[str, Due]:
        """Who is to be evicted while it decodes, in the step that begins."""
        is_short = self.is_short()
        due = self.due_deferred(is_short)
        early: list[tuple[int, int, str, Due]] = []
        for request_id, expected in self.expected.items():
            bound, tokens = expected.bound, self.certain(expected.request)
            if bound is None or not expected.is_decided or expected.reserved:
                continue
            grown = (tokens - (expected.evicted or bound.start)) // BLOCK_SIZE
            present = len(expected.kept) + (tokens - expected.evicted) // BLOCK_SIZE
            if bound.num_kept >= present:
                continue
            if grown >= bound.growth:
                due[request_id] = Due("every", tokens, bound.num_kept)
            elif grown > 0:
                order = -self.order_of_decision[request_id]
                eviction = Due("every", tokens, bound.num_kept, is_early=True)
                early.append((grown, order, request_id, eviction))
        if is_short and early and not due:
            *_, request_id, eviction = max(early)
            due[request_id] = eviction
            self.seen["evicted early again"] += 1
        if self.by_pressure:
            due |= self.due_by_pressure(due)
        return due

    def is_short(self) -> bool:
        """Whether blocks may run out before an eviction's come back."""
        decided = [e for e in self.expected.values() if e.is_decided]
        kept = max((e.bound.num_kept for e in decided if e.bound is not None), default=0)
        needed = sum(-r.num_computed_tokens % BLOCK_SIZE < 3 for r in self.scheduler.running)
        needed *= 1 + len(self.others)
        for expected in decided:
            if expected.to_free:
                row = self.rows(expected.request.request_id)[GROUP]
                if self.last_of(row[: expected.evicted // BLOCK_SIZE]) or expected.replaced:
                    return False
        can_evict = kept or any(expected.reserved for expected in decided)
        return bool(can_evict) and needed + kept > self.pool.get_num_free_blocks()

    def due_deferred(self, is_short: bool) -> dict[str, Due]:
        """Those whose answer has begun; if there are none, one early where blocks may run out."""
        due: dict[str, Due] = {}
        early: dict[str, Due] = {}
        for request_id in self.awaiting:
            expected = self.expected[request_id]
            request = expected.request
            in_flight = request.num_in_flight_tokens if self.setup.num_drafts else 0
            certain = request.num_computed_tokens - in_flight
            eviction = Due("prefill", self.certain(request), len(expected.reserved))
            if certain >= expected.evict_at - 1:
                due[request_id] = eviction
            elif is_short and certain >= expected.prompt_tokens:
                early.setdefault(request_id, eviction)
        if due or not early:
            return due
        self.seen["evicted early"] += 1
        return dict([next(iter(early.items()))])

    @property
    def awaiting(self) -> list[str]:
        """Ids of the requests whose eviction waits, the longest first."""
        waiting = [i for i, expected in self.expected.items() if expected.reserved]
        return sorted(waiting, key=self.order_of_decision.__getitem__)

    def due_by_pressure(self, due: dict[str, Due]) -> dict[str, Due]:
        """At most four of those with all of their cache, until the excess is gone."""
        free = self.pool.get_num_free_blocks()
        is_on = self.manager.decisions.pressure.is_on
        if not is_on and free > self.usable // 2:
            return {}
        excess = self.load() - int(self.high * self.usable)
        for expected in self.expected.values():
            if expected.to_free:
                row = self.rows(expected.request.request_id)[GROUP]
                excess -= self.last_of(row[: expected.evicted // BLOCK_SIZE])
                excess -= len(expected.replaced)
        gains = []
        for request in reversed(self.scheduler.running):
            expected = self.expected[request.request_id]
            if not expected.is_decided or expected.skip != Skip.NO_PRESSURE or expected.evicted:
                continue
            if request.request_id in due:
                continue
            tokens = self.certain(request)
            if tokens < expected.prompt_tokens // BLOCK_SIZE * BLOCK_SIZE:
                self.seen["pressure waits for a prefill in flight"] += 1
                continue
            num_kept = ceil_share(expected.budget, cdiv(request.num_computed_tokens, BLOCK_SIZE))
            replaced = self.rows(request.request_id)[GROUP][: tokens // BLOCK_SIZE]
            gain = self.last_of(replaced) - num_kept
            if gain > 0:
                gains.append((gain, request.request_id, Due("pressure", tokens, num_kept)))
        if not is_on:
            excess = 0
        chosen: dict[str, Due] = {}
        most_kept = max((eviction.num_kept for _, _, eviction in gains), default=0)
        if gains:
            excess = max(excess, 2 * (len(self.scheduler.running) + most_kept) - free)
        for gain, request_id, eviction in sorted(gains, key=lambda entry: -entry[0]):
            if excess <= 0 or len(chosen) == 4:
                break
            if eviction.num_kept > free:
                continue
            chosen[request_id] = eviction
            excess -= gain
            free -= eviction.num_kept
        return chosen

    def certain(self, request: Request) -> int:
        """Whole blocks of tokens that no rejected draft can take back, in tokens."""
        in_flight = request.num_in_flight_tokens if self.setup.num_drafts else 0
        return max(0, request.num_computed_tokens - in_flight) // BLOCK_SIZE * BLOCK_SIZE

    def last_of(self, blocks: Iterable[int]) -> int:
        """Blocks that no other request holds."""
        return sum(block > 0 and self.pool.blocks[block].ref_cnt == 1 for block in blocks)

    def decide_by_pressure(self, expected: Expected) -> None:
        """What a step says of a prefill that has not ended before it."""
        if self.by_pressure and not expected.is_decided and expected.num_possible:
            is_on = self.manager.decisions.pressure.is_on
            expected.num_kept = expected.num_possible if is_on else 0
            expected.skip = None if is_on else Skip.NO_PRESSURE

    def most_elsewhere(self, num_tokens: int) -> int:
        """Blocks that other groups hold at most for a request."""
        in_flight = self.setup.steps_in_flight * MAX_NUM_TOKENS
        return sum(
            min(
                cdiv(num_tokens, BLOCK_SIZE),
                group.kv_cache_spec.max_admission_blocks_per_request(in_flight, MAX_MODEL_LEN),
            )
            for group in self.others
        )

    def check_pressure(self) -> bool:
        """Whether blocks will count as scarce in the next step."""
        gauge = self.manager.decisions.pressure
        share = Fraction(self.load(), self.usable)
        return share > self.low if gauge.is_on else share >= self.high

    def load(self) -> int:
        """Blocks that are held, and that unfinished prefills ask for."""
        scheduler = self.scheduler
        load = len(self.held())
        room = max(0, self.setup.max_num_seqs - len(scheduler.running))
        waiting = [*scheduler.kv_holding_waiting, *scheduler.waiting][:room]
        for request in [*scheduler.running, *waiting]:
            expected = self.expected.get(request.request_id)
            if expected is not None and expected.is_decided:
                continue
            load += self.asks_for(request)
        return load

    def held(self) -> Counter[int]:
        """How often each block is held."""
        rows = Counter(b for i in self.scheduler.requests for row in self.rows(i) for b in row if b)
        for expected in self.expected.values():
            rows.update([*expected.kept, *expected.replaced, *expected.reserved])
        return rows

    def asks_for(self, request: Request) -> int:
        """Blocks that an unfinished prefill still takes, without kept ones and those of others."""
        rows = self.rows(request.request_id)
        own = len(rows[GROUP])
        if not own and request.request_id not in self.expected:
            for block_hash in request.block_hashes:
                cached = self.pool.get_cached_block(block_hash, [GROUP])
                if cached is None or not cached[0].ref_cnt:
                    break
                own += 1
        elsewhere = sum(block > 0 for row in rows[1:] for block in row)
        return max(0, cdiv(request.num_tokens, BLOCK_SIZE) - own) + max(
            0, self.most_elsewhere(request.num_tokens) - elsewhere
        )

    def runs_out(self, newcomer: Expected) -> bool:
        """Whether the pool does with one more, all evicted requests' answers played out."""
        if not self.settings["output_reserve"]:
            return False
        if not self.expected.keys() - {newcomer.request.request_id}:  # nobody to wait for
            return False
        lasting = self.usable - self.pool.get_num_free_blocks()
        answers: list[Answer] = []
        kept_again = present = 0
        for expected in [*self.expected.values(), newcomer]:
            request = expected.request
            self.decide_by_pressure(expected)
            if request.priority > newcomer.request.priority:  # will be preempted
                lasting -= expected.num_held
                continue
            output = self.evicted_output(expected)
            if output is None:
                lasting += 0 if expected.is_decided else self.asks_for(request)
                continue
            evicted, num_kept, num_prompt, bound = output
            lasting -= expected.num_held
            present += max(expected.num_held, self.blocks_before(expected, num_kept))
            generated = request.num_output_tokens
            most = request.max_tokens
            longer = [share for share in self.answers[-256:] if share > Fraction(generated, most)]
            length = ceil(most * sum(longer) / len(longer)) if len(longer) >= 8 else most
            here = max(0, request.num_tokens - evicted)
            period = 0
            if bound is not None:
                num_kept = max(num_kept, bound.num_kept)
                kept_again = max(kept_again, bound.num_kept)
                period = bound.growth * BLOCK_SIZE
            answers.append(Answer(num_kept, here, max(0, length - generated), num_prompt, period))
        moments = {answer.coming for answer in answers}
        for answer in answers:
            if answer.period:
                until = -answer.tokens % answer.period
                moments |= {until, until + answer.period}
        peak = max(
            (sum(answer.blocks(moment) for answer in answers) for moment in moments), default=0
        )
        most = max(0, lasting) + max(peak + kept_again, present)
        return bool(answers) and most > self.usable

    def blocks_before(self, expected: Expected, num_kept: int) -> int:
        """What a request may hold before an eviction that waits for its answer."""
        request = expected.request
        by_load = expected.is_decided and expected.skip == Skip.NO_PRESSURE
        tokens = request.num_tokens if by_load else expected.prompt_tokens
        evict_at = request.num_prompt_tokens + self.config.policy.evict_after
        if expected.evicted or evict_at <= tokens:
            return 0
        return cdiv(evict_at, BLOCK_SIZE) + num_kept

    def evicted_output(self, expected: Expected) -> tuple[int, int, int, Bound | None] | None:
        """E, M, N and the bound of a request that is evicted, or will or can be; None of others."""
        if expected.evicted:
            return expected.evicted, len(expected.kept), expected.num_prompt, expected.bound
        if expected.is_decided and expected.skip == Skip.NO_PRESSURE:
            if not self.manager.decisions.pressure.is_on:
                return None
            bound, expected = expected.bound, self.begin(expected.request)
            expected.bound = bound
        elif expected.is_decided and not expected.reserved:
            return None
        if not expected.num_kept:
            return None
        evicted = expected.prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
        bound = expected.bound or self.bound_of(expected)
        return evicted, expected.num_kept, expected.num_prompt, bound

    def check_hit(
        self, request: Request, result: tuple[KVCacheBlocks, int, int, bool]
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """A hit is as long as it can be, and swallows no query that will be observed."""
        blocks, num_tokens = result[:2]
        expected = self.begin(request)
        longest = 0
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // BLOCK_SIZE]:
            if self.pool.get_cached_block(block_hash, [GROUP]) is None:
                break
            longest += BLOCK_SIZE
        limit = request.num_tokens
        if expected.num_possible:
            limit = expected.observed_from // BLOCK_SIZE * BLOCK_SIZE
        self.seen["prefix hit"] += num_tokens > 0
        self.seen["trimmed hit"] += longest > limit
        assert num_tokens <= min(longest, limit)
        if not self.others:  # a window of another group may be missing
            if expected.num_possible:  # vLLM would lengthen a prefill of one token by drafts
                limit = min(limit, (request.num_tokens - 2) // BLOCK_SIZE * BLOCK_SIZE)
            assert num_tokens >= min(longest, limit)
        assert all(len(ids) == num_tokens // BLOCK_SIZE for ids in blocks.get_block_ids())
        return result

    def check_allocation(
        self, allocate: Any, request: Request, num_new: int, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """Predict whether a step's blocks are there, and which they are."""
        request_id = request.request_id
        expected = self.expected.get(request_id) or self.begin(request)
        self.decide_by_pressure(expected)
        expected.had_stale_output |= request.num_stale_output_tokens > 0
        hits = kwargs.get("new_computed_blocks")
        hit_ids = hits.get_block_ids()[GROUP] if hits is not None else []
        computed = request.num_computed_tokens + kwargs.get("num_new_computed_tokens", 0)
        end = computed + num_new
        free = self.pool.get_num_free_blocks()
        # Cached blocks that nobody holds count as free until they are hit.
        revived = sum(not self.pool.blocks[block].ref_cnt for block in hit_ids)
        ends = not expected.is_decided and expected.num_kept > 0
        # The end of an evicted prefill leaves room for the first decode block.
        reserve = ends * (expected.num_kept + 1)
        held = max(len(hit_ids), expected.num_blocks)
        fits = True
        if kwargs.get("full_sequence_must_fit"):
            missing = max(0, cdiv(request.num_tokens, BLOCK_SIZE) - held)
            fits = missing + revived + reserve <= free
            if fits and self.runs_out(expected):
                self.seen["kept room for outputs"] += 1
                fits = False
        before = self.rows(request_id)
        processed = computed - request.num_in_flight_tokens
        while expected.to_free and processed >= expected.to_free[0][0]:
            free += self.check_freeing(expected, before[GROUP])
        self.seen["freeing waits for a step in flight"] += bool(expected.to_free)
        num_fresh = max(0, cdiv(end, BLOCK_SIZE) - held)
        missing = num_fresh + revived
        due, may_wait = self.due.get(request_id), False
        if due is not None and due.trigger != "prefill":
            may_wait = due.trigger == "pressure" or due.is_early or missing == 0
            missing += due.num_kept
            if not may_wait and missing > self.usable - expected.num_held:
                self.seen["a bound that cannot hold"] += 1
                expected.has_no_room = True
                missing, due = missing - due.num_kept, None
                del self.due[request_id]
            elif may_wait and missing > free:
                self.seen["nobody is preempted for an eviction"] += not self.others
                waits = due.trigger == "every" and not due.is_early and not self.others
                self.seen["a bound waits while the last block has room"] += waits
                missing, due = missing - due.num_kept, None
                if not self.others:
                    del self.due[request_id]
        elif due is None and end >= expected.prompt_tokens:
            missing += reserve
        fits = fits and missing <= free
        cached = {b.block_id for b in self.pool.blocks if b.block_hash is not None}

        allocated = allocate(request, num_new, **kwargs)

        if not self.others:  # they take and free blocks too
            assert (allocated is not None) == fits
        if allocated is None:
            self.seen["allocation failed"] += 1
            assert request_id not in self.manager._orders
            after = self.rows(request_id)
            assert after[GROUP] == before[GROUP]
            return None
        fresh = allocated.get_block_ids()[GROUP]
        order, _ = self.manager._orders.get(request_id, (None, None))
        kept = order.kept_blocks if order is not None else ()
        assert len(fresh) == len(set(fresh)) == num_fresh
        assert len(kept) == len(set(kept))
        assert not set(kept).intersection(self.rows(request_id)[GROUP])
        assert all(block and self.pool.blocks[block].ref_cnt == 1 for block in (*fresh, *kept))
        self.seen["cached block reused"] += bool(cached.intersection(fresh))
        hashed = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
        self.promised[request_id] = (hashed - cached).union(hashed.intersection(fresh))
        self.expected[request_id] = expected
        expected.num_blocks = held + num_fresh
        if self.others and (later := self.due.pop(request_id, None)):
            # What other groups freed in this call decides whether there was room.
            due = later if order is not None or not may_wait else None
        self.due.pop(request_id, None)
        if due is not None:
            self.check_order(expected, order, due.trigger, due.tokens, due.num_kept, computed + 1)
        elif not expected.is_decided and end >= expected.prompt_tokens:
            expected.is_decided = True
            self.order_of_decision[request_id] = self.num_decided
            self.num_decided += 1
            expected.bound = self.bound_of(expected)
            if expected.skip is None:
                tokens = expected.prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
                safe_at = expected.prompt_tokens
                num_kept = expected.num_kept
                if expected.bound is not None:
                    num_kept = min(num_kept, expected.bound.num_kept)
                evict_at = request.num_prompt_tokens + self.config.policy.evict_after
                if evict_at > expected.prompt_tokens:
                    assert order is None
                    self.check_deferral(expected, num_kept, evict_at)
                else:
                    self.check_order(expected, order, "prefill", tokens, num_kept, safe_at)
                self.seen["evicted after preemption"] += request.num_preemptions > 0
            else:
                assert order is None
                self.num_skipped[expected.skip] += 1
                self.seen[f"skip {expected.skip.value}"] += 1
        else:
            assert order is None
        return allocated

    def check_freeing(self, expected: Expected, row: list[int]) -> int:
        """The step of an eviction is processed: blocks that it replaced go back; how many."""
        (_, evicted, replaced), *others = expected.to_free
        end = evicted // BLOCK_SIZE
        columns = row[expected.num_freed : end]
        last = self.last_of(columns)
        self.seen["shared prompt freed"] += last < len(columns)
        self.seen["prompt freed"] += 1
        last += len(replaced)
        self.num_freed += last
        row[:end] = [0] * end
        expected.num_freed, expected.to_free = end, tuple(others)
        return last

    def check_deferral(self, expected: Expected, num_kept: int, evict_at: int) -> None:
        """The prefill that is being scheduled ends, and the eviction waits for the answer."""
        request_id = expected.request.request_id
        reserved = tuple(block.block_id for block in self.manager._reserved[request_id])
        assert len(reserved) == len(set(reserved)) == num_kept
        expected.evict_at, expected.reserved = evict_at, reserved
        self.deferred.append(request_id)
        self.seen["deferred"] += 1

    def check_order(
        self,
        expected: Expected,
        order: EvictionOrder | None,
        trigger: str,
        tokens: int,
        num_kept: int,
        safe_at: int,
    ) -> None:
        """The step that is being scheduled evicts a request."""
        request = expected.request
        assert order is not None
        assert order.evicted_tokens == tokens
        self.waited[request.request_id] = bool(expected.reserved)
        if expected.reserved:
            assert order.kept_blocks == expected.reserved
            expected.reserved = ()
            self.seen["evicted after it was deferred"] += 1
        assert len(order.kept_blocks) == num_kept
        assert tokens <= safe_at
        self.orders[request.request_id] = order
        if not expected.evicted:
            expected.first_evicted = tokens
            expected.hashed = max(tokens, request.num_tokens)
        present = len(expected.kept) + (tokens - expected.evicted) // BLOCK_SIZE
        freed_tokens = (present - num_kept) * BLOCK_SIZE
        self.counted[request.request_id] = trigger, not expected.evicted, freed_tokens
        self.seen[f"evicted by {trigger}"] += 1
        self.seen["evicted again"] += expected.evicted > 0
        self.seen["evicted beside drafts"] += self.setup.num_drafts > 0
        self.seen["evicted with an eviction in flight"] += bool(expected.to_free)
        expected.to_free += ((safe_at, tokens, expected.kept),)
        expected.kept, expected.evicted = order.kept_blocks, tokens

    def rows(self, request_id: str) -> tuple[list[int], ...]:
        """Block ids by group, 0 is null."""
        rows = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return rows or ([],) * (1 + len(self.others))

    # What must hold after every rule.

    @invariant()
    def check_everything(self) -> None:
        self.check_rows()
        self.check_holders()
        self.check_cache()
        self.check_stats()

    def check_rows(self) -> None:
        for request_id, request in self.scheduler.requests.items():
            row, expected = self.rows(request_id)[GROUP], self.expected.get(request_id)
            if expected is None:
                assert request.status != RequestStatus.RUNNING
                assert not row
                continue
            assert len(row) == expected.num_blocks
            assert not any(row[: expected.num_freed])
            assert 0 not in row[expected.num_freed :]
            allowed = expected.num_allowed
            if allowed is not None and expected.is_decided:
                assert expected.num_held <= allowed + self.num_ahead(expected), "beyond its bound"
            for block in expected.reserved:
                assert self.pool.blocks[block].ref_cnt == 1
                assert self.pool.blocks[block].block_hash is None
            if expected.evicted:
                for block in expected.kept + expected.replaced:
                    assert self.pool.blocks[block].ref_cnt == 1
                    assert self.pool.blocks[block].block_hash is None
                first = max(expected.num_freed, cdiv(expected.hashed, BLOCK_SIZE))
                for block in (self.pool.blocks[i] for i in row[first:]):
                    assert block.ref_cnt == 1
                    assert block.block_hash is None
            elsewhere = self.cached_elsewhere.get(request_id, set())
            for n, block in enumerate(
                self.pool.blocks[i] for i in row[: self.num_cached(expected)]
            ):
                assert block.is_null or block.block_hash is not None or n in elsewhere

    def num_cached(self, expected: Expected) -> int:
        """Leading blocks of a row that others may share."""
        request = expected.request
        known = request.num_computed_tokens - request.num_output_placeholders
        if expected.evicted:
            known = min(known, expected.first_evicted)
        if expected.num_kept or self.setup.num_drafts:  # drafts may be rejected
            known = min(known, expected.prompt_tokens)
        return min(known, request.num_tokens) // BLOCK_SIZE

    def check_holders(self) -> None:
        """Every block is free, or held as often as rows name it, or kept by one request."""
        requests = self.scheduler.requests
        held = self.held()
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id]
        assert self.pool.get_num_free_blocks() == self.usable - len(held)
        places: dict[int, tuple[int, int]] = {}
        for request_id in requests:
            for group, row in enumerate(self.rows(request_id)):
                for place in ((block, (group, n)) for n, block in enumerate(row) if block):
                    assert places.setdefault(*place) == place[1], "shared, but not as a prefix"

    def check_cache(self) -> None:
        """Blocks with a hash hold, on all workers and layers, what the hash says."""
        for request in self.scheduler.requests.values():
            self.learn(request)
        hashed = [
            b
            for b in self.pool.blocks
            if b.block_hash is not None and get_group_id(b.block_hash) == GROUP
        ]
        for worker in self.workers if hashed else ():
            contents = worker.contents()
            assert contents[0] == [[FREE] * BLOCK_SIZE] * NUM_LAYERS, "the null block was written"
            for block in hashed:
                expected = self.of_hash[block.block_hash[:-4]]
                stored = [of_layer(layer, [expected])[0] for layer in range(NUM_LAYERS)]
                assert contents[block.block_id] == stored

    def learn(self, request: Request) -> None:
        """What blocks with a request's hashes must hold."""
        hashes = request.block_hashes
        if hashes and hashes[-1] not in self.of_hash:
            labels = self.labels(request, request.all_token_ids)
            for n, block_hash in enumerate(hashes):
                self.of_hash[block_hash] = labels[n * BLOCK_SIZE : (n + 1) * BLOCK_SIZE]

    def check_stats(self) -> None:
        totals = self.scheduler.eviction_stats
        assert totals.evicted == self.num_evicted
        assert totals.evictions == self.num_evictions
        assert totals.retained.count == self.num_evictions.total()
        assert totals.freed_tokens == self.num_freed_tokens
        assert totals.skipped == {skip.value: n for skip, n in self.num_skipped.items()}
        assert totals.freed_blocks == self.num_freed
        evicted = [expected for expected in self.expected.values() if expected.evicted]
        assert self.manager.blocks_held == sum(expected.num_held for expected in evicted)
        self.manager.take_stats()
        expected = Counter({f"skip {s.value}": n for s, n in self.num_skipped.items()})
        expected.update({f"by {name}": n for name, n in self.num_evictions.items()})
        expected.update(evicted=self.num_evicted, freed=self.num_freed)
        assert self.reported == expected

    def teardown(self) -> None:
        """Whoever is left comes to an end, and nothing remains."""
        if not hasattr(self, "workers") or sys.exc_info()[0] is not None:
            return  # what went wrong is known
        for number in range(1000):
            for request in self.streaming():
                self.finish(request.request_id)
            if number == 500:  # vLLM preempts nobody who waits between two pieces of a prompt
                for request_id in self.waiting_with_blocks():
                    self.finish(request_id)
            if not self.scheduler.has_requests() and not self.in_flight:
                break
            self.advance()
        self.check_everything()
        assert not self.scheduler.requests, f"never end: {self.scheduler.requests}"
        assert not self.scheduler.has_requests()
        assert self.pool.get_num_free_blocks() == self.usable
        assert all(block.ref_cnt == 0 for block in self.pool.blocks[1:])
        manager = self.manager
        assert not manager.req_to_blocks
        assert not manager.num_cached_block
        assert not manager.decisions.decided_plans
        assert not manager._evicted
        assert not manager._orders
        assert not manager._reserved
        assert not manager._newly_deferred
        assert not manager.later._deferred
        assert not manager.later._bounds
        assert not any(len(worker.evictor.requests) for worker in self.workers)
        assert self.scheduler.reset_prefix_cache()

    def waiting_with_blocks(self) -> list[str]:
        requests = self.scheduler.requests.items()
        return [i for i, r in requests if r.status == RequestStatus.WAITING and self.rows(i)[GROUP]]


class HybridSchedulerMachine(SchedulerMachine):
    """Beside our group one of vLLM's with a sliding window, in the same pool."""

    others = (
        KVCacheGroupSpec(
            ["window.0", "window.1", "window.2"],
            SlidingWindowSpec(
                block_size=BLOCK_SIZE,
                num_kv_heads=1,
                head_size=32,
                dtype=torch.float32,
                sliding_window=9,
            ),
        ),
    )
    least_blocks = 2 * SchedulerMachine.least_blocks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only cost."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


# Rarer ones have tests of their own: test_later_evictions.py.
EVENTS = (
    "abort",
    "allocation failed",
    "cached block reused",
    "cached elsewhere",
    "deferred",
    "draft accepted",
    "draft rejected",
    "evicted after it was deferred",
    "evicted after preemption",
    "evicted again",
    "evicted beside drafts",
    "evicted by every",
    "evicted by prefill",
    "evicted by pressure",
    "evicted early",
    "finished after chunks",
    "freeing waits for a step in flight",
    "id reused",
    "kept room for outputs",
    "observed",
    "observed while it decodes",
    "preempt evicted",
    "prefix hit",
    "prompt freed",
    "reset",
    "shared prompt freed",
    "stale output",
    "streamed on",
    "trimmed hit",
    "two orders in a step",
    # Observation is bounded on GPUs only: test_observation_budget.py. KV connectors hand over.
    *(
        f"skip {skip.value}"
        for skip in Skip
        if skip not in (Skip.NO_OBSERVATION_ROOM, Skip.HANDED_OVER)
    ),
)


@pytest.mark.parametrize(
    ("machine", "num_examples"),
    [(SchedulerMachine, 400), (HybridSchedulerMachine, 60)],
    ids=["one-group", "sliding-window-group"],
)
def test_random_histories(machine: type[SchedulerMachine], num_examples: int) -> None:
    seen = machine.seen = Counter()
    run_state_machine_as_test(machine, settings=histories(num_examples))
    if machine.others:
        return
    # The histories must reach what they are meant to try.
    missing = [event for event in EVENTS if not seen[event]]
    assert not missing, f"no history had: {missing} ({dict(seen)})"


def story(
    setup: dict[str, Any], policy: EvictionPolicy, num_blocks: int = 20, **settings: Any
) -> SchedulerMachine:
    """A machine to tell one history with, over ``num_blocks`` more blocks than it must have."""
    machine = SchedulerMachine()
    machine.seen = Counter()
    machine.start(
        num_blocks=num_blocks,
        settings={
            "policy": policy,
            "budget": "0.25",
            "when": "always",
            "text": False,
            "min_prompt_tokens": 0,
            "output_reserve": True,
            "every": None,
            "marks": ("0.9", "0.7"),
        }
        | settings,
        scheduler=setup,
        page_order=PAGE_ORDERS[0],
    )
    return machine


def wish(**changes: Any) -> Wish:
    """26 tokens, of which 14 are an image."""
    plain = Wish(2, 14, "cat", 10, 0, 9, 99, None, None, "image", False, 0, 0)
    return replace(plain, **changes)


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
def test_a_prefill_of_one_token_beside_drafts(use_v2: bool) -> None:
    """vLLM pads it with drafts, so that the step goes beyond the prefill's end."""
    policy = VLCachePolicy(max_observation_tokens=1)
    machine = story({"num_drafts": 2, "use_v2": use_v2}, policy)
    for _ in range(2):  # all but the last of 25 tokens are cached for the second
        machine.add_request(wish(after=9), False)
        machine.advance()
        machine.check_everything()
    machine.teardown()


def test_a_request_that_is_alone_does_not_wait() -> None:
    """Its prompt fits, but not beside what a later eviction of its output would keep."""
    machine = story({"must_fit": True}, VLCachePolicy(), 0, budget="0.75", every=9)
    machine.add_request(wish(after=20), False)
    machine.advance()
    assert [r.status for r in machine.scheduler.requests.values()] == [RequestStatus.RUNNING]
    machine.check_everything()
    machine.teardown()


def test_a_stage_that_samples_nothing_knows_where_a_prefill_ends() -> None:
    """It hears of a token with the next step, too late if a preemption comes before."""
    machine = story({"steps_in_flight": 2}, VLCachePolicy())
    machine.add_request(wish(), False)
    for _ in range(14):
        machine.advance()
    while machine.in_flight:
        machine.complete()
    machine.reset()
    for _ in range(4):
        machine.advance(max_tokens=10)
        machine.check_everything()
    machine.teardown()
