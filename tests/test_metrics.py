# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics and the log line, without an engine."""

import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Metric
from vllm.v1.metrics import loggers
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from tests.core.test_stats import some_stats
from vl_cache_vllm import deprecated
from vl_cache_vllm.core.stats import EvictionStats, Samples
from vl_cache_vllm.messages import put_stats
from vl_cache_vllm.metrics import KVCompressStatLogger, log_line


def make_logger(show_hidden: bool = False, **kwargs: Any) -> KVCompressStatLogger:
    unregister_vllm_metrics()
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="reader"),
        observability_config=SimpleNamespace(show_hidden_metrics=show_hidden),
    )
    return KVCompressStatLogger(config, [0, 1], **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def stat_logger() -> Iterator[KVCompressStatLogger]:
    yield make_logger()
    unregister_vllm_metrics()


def value(name: str, engine: int = 0, **labels: str) -> float | None:
    labels |= {"model_name": "reader", "engine": str(engine)}
    return REGISTRY.get_sample_value(f"vllm:kv_compress_{name}", labels)


def record(stat_logger: KVCompressStatLogger, stats: EvictionStats, engine: int = 0) -> None:
    carrier = SchedulerStats()
    put_stats(carrier, stats.to_dict())
    stat_logger.record(carrier, None, engine_idx=engine)
    assert carrier.kv_connector_stats is None  # vLLM's loggers would take it for a connector's


def test_metrics_start_at_zero(stat_logger: KVCompressStatLogger) -> None:
    for engine in (0, 1):
        for name in ("evicted_requests_total", "freed_blocks_total", "freed_tokens_total"):
            assert value(name, engine) == 0
        for name in ("retained_ratio", "observation_seconds", "compaction_seconds"):
            assert value(f"{name}_count", engine) == 0
        assert value("blocks_held", engine) == 0


def test_record(stat_logger: KVCompressStatLogger) -> None:
    record(stat_logger, some_stats(), engine=1)
    record(stat_logger, some_stats(), engine=1)
    record(stat_logger, EvictionStats(freed_blocks=7, blocks_held=3, pressure=False), engine=1)
    stat_logger.record(SchedulerStats(), None, engine_idx=1)
    stat_logger.record(None, None, engine_idx=1)
    assert value("evicted_requests_total", 1) == 2
    assert value("skipped_requests_total", 1, reason="text_only") == 4
    assert value("freed_tokens_total", 1) == 32
    assert value("evictions_total", 1, trigger="prefill") == 2
    assert value("evictions_total", 1, trigger="every") == 0
    assert value("freed_blocks_total", 1) == 7
    assert value("retained_ratio_sum", 1) == pytest.approx(4 / 7)
    assert value("observation_seconds_sum", 1) == pytest.approx(0.02)
    assert value("compaction_seconds_count", 1) == 2
    assert [value("layer_retained_ratio", 1, layer=str(i)) for i in (0, 1, 2)] == [0.1, 0.3, None]
    assert (value("blocks_held", 1), value("pressure", 1)) == (3, 0)
    assert value("evicted_requests_total", 0) == 0


def test_old_names_are_hidden_as_vllm_hides_its_own() -> None:
    for show_hidden in (False, True):
        record(make_logger(show_hidden), some_stats())
        shares = value("retained_share_sum"), value("layer_retained_share", layer="1")
        ratios = value("retained_ratio_sum"), value("layer_retained_ratio", layer="1")
        assert None not in ratios
        assert shares == (ratios if show_hidden else (None, None))
        unregister_vllm_metrics()


def interval(*stats: EvictionStats) -> str:
    return log_line(sum(stats, start=EvictionStats()))


def test_the_line_of_an_interval() -> None:
    stats = some_stats()
    stats.freed_blocks = 5
    assert interval(stats) == (
        "KV compression: evicted 1 reqs, skipped 3 (2 text_only, 1 no_post_vision_tokens), "
        "retained 28.6%, freed 5 blocks and 16 tokens, layers 10.0 to 30.0%, observation 10.0 ms, "
        "compaction 2.0 ms, blocks held 5, pressure on"
    )
    assert interval(EvictionStats(skipped=stats.skipped)) == (
        "KV compression: evicted 0 reqs, skipped 3 (2 text_only, 1 no_post_vision_tokens), "
        "blocks held 0"
    )
    more = EvictionStats(
        evicted=3,
        retained=Samples(3, 0.4),
        freed_blocks=4,
        freed_tokens=20,
        blocks_held=1,
        pressure=False,
    )
    assert interval(stats, more) == (
        "KV compression: evicted 4 reqs, skipped 3 (2 text_only, 1 no_post_vision_tokens), "
        "retained 17.1%, freed 9 blocks and 36 tokens, layers 10.0 to 30.0%, observation 10.0 ms, "
        "compaction 2.0 ms, blocks held 1, pressure off"
    )


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("vllm.vl_cache.metrics"),
        "info",
        lambda text, *arguments: written.append(text % arguments),
    )
    return written


def test_log_lines_are_of_one_interval(stat_logger: KVCompressStatLogger, lines: list[str]) -> None:
    stat_logger.log()
    assert not lines
    record(stat_logger, some_stats(), engine=1)
    stat_logger.log()
    stat_logger.log()
    assert lines == [f"Engine 001: {interval(some_stats())}"]


def test_a_front_end_that_sees_a_part_logs_nothing(lines: list[str]) -> None:
    stat_logger = make_logger(log_lines=False)
    record(stat_logger, some_stats())
    stat_logger.log()
    assert not lines
    assert value("evicted_requests_total") == 1
    unregister_vllm_metrics()


def test_the_dashboard_asks_for_metrics_that_exist(stat_logger: KVCompressStatLogger) -> None:
    """Ours by their full names, vLLM's by those its own logger registers."""
    text = (Path(__file__).parents[1] / "examples" / "grafana.json").read_text()
    asked = set(re.findall(r"vllm:\w+", text))
    ours = {name for name in asked if name.startswith("vllm:kv_compress_")}
    record(stat_logger, some_stats())
    exported = {sample.name for metric in REGISTRY.collect() for sample in metric.samples}
    assert ours <= exported
    families = {name for name in exported if name.startswith("vllm:kv_compress_")}
    shown = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in families}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours} >= shown - {
        "vllm:kv_compress_evicted_requests",
        "vllm:kv_compress_skipped_requests",
        "vllm:kv_compress_evictions",
        "vllm:kv_compress_freed_blocks",
        "vllm:kv_compress_freed_tokens",  # the created-at samples of counters
        "vllm:kv_compress_freed_tokens_total",
    }
    source = inspect.getsource(loggers)
    assert all(name.removesuffix("_total") in source for name in asked - ours)


def test_the_docs_list_every_metric(stat_logger: KVCompressStatLogger) -> None:
    """With its type and its own labels."""
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `(vllm:kv_compress_\w+)` \| (\w+) \| (\S*) \|", text, re.M))
    record(stat_logger, some_stats())
    families = [m for m in REGISTRY.collect() if m.name.startswith("vllm:kv_compress_")]
    assert listed == {
        (m.name + "_total" * (m.type == "counter"), m.type, ", ".join(own_labels(m)))
        for m in families
    }


def own_labels(metric: Metric) -> list[str]:
    """The labels that not all metrics have."""
    names = {name for sample in metric.samples for name in sample.labels}
    return [f"`{name}`" for name in sorted(names - {"model_name", "engine", "le"})]


def test_the_docs_name_every_renamed_metric() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    for old, new in deprecated.METRICS.items():
        assert f"| `vllm:kv_compress_{old}` | `vllm:kv_compress_{new}` |" in text
