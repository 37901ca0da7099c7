# SPDX-License-Identifier: Apache-2.0
"""Everything of ours that travels on vLLM's objects between its processes and components.

| message | carrier | from | to |
| --- | --- | --- | --- |
| admitted requests | ``SchedulerOutput.kv_compress_admitted`` | scheduler | workers |
| eviction orders | ``SchedulerOutput.kv_compress_orders`` | scheduler | workers |
| deferred evictions | ``SchedulerOutput.kv_compress_deferred`` | scheduler | workers |
| eviction reports | ``ModelRunnerOutput.kv_compress_reports`` | last pipeline stage | scheduler |
| statistics | ``SchedulerStats.kv_connector_stats["kv_compress"]`` | scheduler | front end |
| running step | ``kv_compress_step`` of attention metadata | worker | attention layers |
| "the front end reads statistics" | environment variable `SEND_STATS` | front end | engine cores |

Each message has a ``put_`` and a ``take_`` function. Objects that cross processes carry plain data.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

SEND_STATS = "_VL_CACHE_VLLM_SEND_STATS"
"""Set by a front end that takes our statistics out before vLLM's own loggers read them."""

_ADMITTED = "kv_compress_admitted"
_ORDERS = "kv_compress_orders"
_DEFERRED = "kv_compress_deferred"
_REPORTS = "kv_compress_reports"
_STEP = "kv_compress_step"
_STATS = "kv_compress"


# --------------------------------------------------------------------------------------------------
# Scheduler to workers


def put_admitted(output: SchedulerOutput, request_ids: list[str]) -> None:
    """Name the requests that may be observed from this step on."""
    setattr(output, _ADMITTED, request_ids)


def take_admitted(output: SchedulerOutput) -> list[str] | None:
    """The ids of `put_admitted`; None where observation is not bounded."""
    return getattr(output, _ADMITTED, None)


@dataclass(frozen=True)
class EvictionOrder:
    """Replace a request's first tokens by kept blocks at the end of the step."""

    evicted_tokens: int  # E: how many, whole blocks
    kept_blocks: tuple[int, ...]  # ids of fresh blocks, M


def put_orders(output: SchedulerOutput, orders: Mapping[str, EvictionOrder]) -> None:
    """Name the requests to evict in this step, by id."""
    if orders:
        plain = {key: (order.evicted_tokens, order.kept_blocks) for key, order in orders.items()}
        setattr(output, _ORDERS, plain)


def take_orders(output: SchedulerOutput) -> dict[str, EvictionOrder]:
    """The orders of `put_orders`; most steps have none."""
    return {key: EvictionOrder(*order) for key, order in getattr(output, _ORDERS, {}).items()}


def put_deferred(output: SchedulerOutput, request_ids: list[str]) -> None:
    """Name the requests whose prefill ends in this step and whose eviction is still to come."""
    if request_ids:
        setattr(output, _DEFERRED, request_ids)


def take_deferred(output: SchedulerOutput) -> list[str]:
    """The ids of `put_deferred`."""
    return getattr(output, _DEFERRED, [])


# --------------------------------------------------------------------------------------------------
# Workers to scheduler


@dataclass(frozen=True)
class EvictionReport:
    """What a worker did for one eviction; times are in seconds of the device."""

    observation_seconds: float
    compaction_seconds: float | None = None  # None: the prompt was observed, but not evicted
    layers_retained: dict[int, float] | None = None  # by layer: tokens after / before the eviction


PendingReport = Callable[[], EvictionReport]
"""Builds the report; blocks until the device has finished the eviction."""


class _OutputWithReports(AsyncModelRunnerOutput):
    """An asynchronous output that gets its reports when vLLM reads it."""

    def __init__(self, output: AsyncModelRunnerOutput, reports: list[PendingReport]) -> None:
        self._output, self._reports = output, reports

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        put_reports(output, self._reports)
        return output

    def get_kv_connector_output(self) -> Any:
        """vLLM 0.33 calls this."""
        return self._output.get_kv_connector_output()  # type: ignore[attr-defined]


def put_reports(output: Any, reports: list[PendingReport]) -> Any:
    """Add the reports to a step's output and return it, wrapped if it is asynchronous."""
    if not reports:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _OutputWithReports(output, reports)
    setattr(output, _REPORTS, [asdict(report()) for report in reports])
    return output


def take_reports(output: ModelRunnerOutput) -> list[dict[str, Any]]:
    """The fields of the `EvictionReport`s of an output; most outputs have none."""
    return getattr(output, _REPORTS, [])


# --------------------------------------------------------------------------------------------------
# Scheduler to front end


def put_stats(stats: SchedulerStats, values: dict[str, Any]) -> None:
    """Send plain values along with vLLM's statistics of a step.

    ``kv_connector_stats`` is the one field of vLLM's statistics that carries free-form data. It may
    already have those of a KV connector.
    """
    stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), _STATS: values}


def take_stats(stats: SchedulerStats) -> dict[str, Any] | None:
    """Remove the values of `put_stats` before vLLM's loggers look for a KV connector's."""
    carried = stats.kv_connector_stats
    if not carried or _STATS not in carried:
        return None
    others = {key: value for key, value in carried.items() if key != _STATS}
    stats.kv_connector_stats = others or None
    return dict(carried[_STATS])


# --------------------------------------------------------------------------------------------------
# Worker to attention layers


def put_step(metadata: Any, step: Any) -> None:
    """Let the layers that read this attention metadata see the step."""
    setattr(metadata, _STEP, step)


def take_step(metadata: Any) -> Any:
    """The step of `put_step`; None where vLLM's own path serves the step unchanged."""
    return getattr(metadata, _STEP, None)
