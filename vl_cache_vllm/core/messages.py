# SPDX-License-Identifier: Apache-2.0
"""What a worker tells the scheduler about its evictions, on the outputs of its steps."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

_ATTRIBUTE = "kv_compress_reports"


@dataclass(frozen=True)
class EvictionReport:
    """One prompt that was observed; times are the device's."""

    observation_seconds: float
    compaction_seconds: float | None = None  # None: it was not evicted
    layers_retained: dict[int, float] | None = None  # by layer: kept tokens / prompt tokens


PendingReport = Callable[[], EvictionReport]
"""Gives the report; waits for the device to have come so far."""


class _OutputWithReports(AsyncModelRunnerOutput):
    """An output that is not there yet."""

    def __init__(self, output: AsyncModelRunnerOutput, reports: list[PendingReport]) -> None:
        self._output, self._reports = output, reports

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        attach(output, self._reports)
        return output

    def get_kv_connector_output(self) -> Any:
        """Asked for by vLLM 0.33; connectors are refused, but a step may have an empty one."""
        return self._output.get_kv_connector_output()  # type: ignore[attr-defined]


def attach(output: Any, reports: list[PendingReport]) -> Any:
    """The output of a step, with what was evicted in it."""
    if not reports:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _OutputWithReports(output, reports)
    setattr(output, _ATTRIBUTE, [asdict(report()) for report in reports])
    return output


def detach(output: ModelRunnerOutput) -> list[dict[str, Any]]:
    """The reports on an output as plain data; none on most."""
    return getattr(output, _ATTRIBUTE, [])
