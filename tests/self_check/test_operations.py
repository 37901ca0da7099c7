# SPDX-License-Identifier: Apache-2.0
"""The check of the operations: Triton's pass, and every planted fault fails its rows only."""

import ast
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.mutated_kernels import KERNELS, Fault, planted
from vl_cache_vllm.ops import dispatch, native
from vl_cache_vllm.ops.observe import RequestObservation
from vl_cache_vllm.self_check import operations
from vl_cache_vllm.self_check.rows import Row, failing
from vl_cache_vllm.self_check.synthetic import AttentionShape, Case, SyntheticPrompt

CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(not native.is_built(), reason="C++ has not been built")
OBSERVATIONS = ("observe", "observe_layers")
MAXIMA = frozenset(f"{name}: maxima" for name in OBSERVATIONS)
DENSE = frozenset(f"{name}: dense entries" for name in OBSERVATIONS)
SCORES = MAXIMA | frozenset(f"{name}: sums" for name in OBSERVATIONS)
OBSERVE = SCORES | DENSE
LAYERS = frozenset(row for row in OBSERVE if row.startswith("observe_layers"))
RANK = frozenset({"rank", "merge_ranking"})
# Small ones that together reach all branches, for the many faults.
SMALL = (
    *operations.CASES[:2],
    dataclasses.replace(operations.CASES[3], num_queries=20),
    operations.CASES[4],
)


def check(cases: tuple[Case, ...] = operations.CASES, implementation: Any = "triton") -> list[Row]:
    return [*operations.compare(cases, CPU, implementation)]


def names(rows: list[Row]) -> set[str]:
    return {row.name for row in rows}


def test_torch_passes() -> None:
    rows = check(implementation="torch")
    assert not failing(rows)
    assert all(row.error == 0 for row in rows)


@pytest.mark.interpreter
def test_triton_passes() -> None:
    assert not failing(check())


def test_every_operation_has_a_row() -> None:
    """Whatever kernels/ implements is checked, and each result of it.

    `select` and `compact` are `select_all` and `compact_all` for one request.
    """
    found = {row.name.partition(":")[0] for row in check(SMALL[:1], "torch")}
    public = {
        node.name.removesuffix("_all")
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and not node.decorator_list
    }
    assert found == public


def test_old_gpus_have_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), {torch.float16, torch.float32}), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        cases = operations.cases_for(torch.device("cuda"))
        assert len(cases) == len(operations.CASES)
        assert {case.dtype for case in cases} == (
            expected or {case.dtype for case in operations.CASES}
        )
    assert operations.cases_for(CPU) is operations.CASES


def test_cases_are_odd() -> None:
    cases = operations.CASES
    assert {case.shape.head_size for case in cases} == {64, 80, 96, 128, 256, 512}
    assert {case.block_size for case in cases} == {16, 32, 48, 64}
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert {1, 2, 4} <= {case.shape.num_kv_heads for case in cases}
    for choice in ("layers_outermost", "heads_interleaved", "weighted", "grouped"):
        assert {getattr(case, choice) for case in cases} == {True, False}
    assert sum(case.tokens % case.block_size != 0 for case in cases) >= 5


FAULTS = (
    Fault("_load_queries", "kv_head * GROUP * head_stride", "kv_head * head_stride", OBSERVE),
    Fault("_load_queries", "row += first_row % GROUP", "row += 0", OBSERVE),
    Fault("_load_keys", "position % BLOCK_SIZE * token_stride", "0 * token_stride", OBSERVE),
    Fault("_logits", "(1 - 2 / (1 + tl", "(1 - 1 / (1 + tl", OBSERVE),
    Fault("_power", "-base[:, None]", "0 * base[:, None]", SCORES),
    Fault(
        "_statistics",
        "(position[None, :] <= last_key[:, None]",
        "(position[None, :] < last_key[:, None]",
        OBSERVE,
    ),
    Fault(
        "_statistics",
        "first_position + first_row // GROUP + 1",
        "first_position + first_row // GROUP + KEYS",
        OBSERVE,
    ),
    Fault("_statistics", "total *= tl.exp2(", "total *= tl.exp2(0 * ", SCORES),
    Fault("combine_kernel", "parts *= tl.exp2(", "parts *= tl.exp2(0 * ", SCORES),
    Fault("combine_kernel", "row_maxima + row, maximum", "row_maxima + row, maximum + 1", OBSERVE),
    Fault(
        "_columns",
        "position[None, :] <= own[:, None]",
        "position[None, :] < own[:, None]",
        OBSERVE,
    ),
    Fault("_columns", "KEYS - 1 - first_position", "1 - first_position", OBSERVE),
    Fault(
        "_columns",
        "(maximum + margin)[",
        "(maximum + 0.5 * margin)[",
        DENSE,
    ),
    Fault(
        "_columns",
        "tl.maximum(before, tl.max(largest, 0))",
        "before + 0.99 * tl.max(largest, 0)",
        MAXIMA,
    ),
    Fault(
        "_columns",
        "factor *= tl.load(of_query, mask=row < num_rows, other=0.0)[:, None]",
        "factor *= 1",
        frozenset({"observe: sums"}),
    ),
    Fault(
        "statistics_kernel",
        "num_keys = tl.load(num_keys_given).to(tl.int32)\n    first_row",
        "num_keys = tl.load(num_keys_given).to(tl.int32) - 1\n    first_row",
        frozenset({"observe: sums", "observe: maxima"}),
    ),
    Fault(
        "columns_kernel",
        "num_keys = tl.load(num_keys_given).to(tl.int32)\n    kv_head",
        "num_keys = tl.load(num_keys_given).to(tl.int32) - 1\n    kv_head",
        frozenset({"observe: sums", "observe: maxima"}),
    ),
    Fault("_float", "bits.to(tl.int32)", "(0 * bits + 0x3F800000).to(tl.int32)", LAYERS),
    Fault("_num_keys", "tl.load(request + 2)", "(tl.load(request + 2) - 1)", LAYERS),
    Fault("_num_keys", "tl.int32)) + layer", "tl.int32)) + 0 * layer", LAYERS - DENSE),
    Fault(
        "statistics_of_step_kernel",
        "if num_splits == 1:",
        "if False:",
        LAYERS - DENSE,
    ),
    Fault(
        "columns_of_step_kernel",
        "tl.where(maxima != 0, num_keys, 0)",
        "0",
        LAYERS & MAXIMA,
    ),
    Fault("_finite", "tl.minimum(weight, 1e300)", "1.0", frozenset({"apportion"})),
    Fault("_weight", "tl.maximum(largest, 1e-300), 1e-100", "1.0, 0.9", frozenset({"apportion"})),
    Fault("_quota", "tl.maximum(scale * weight, 1.0)", "scale * weight", frozenset({"apportion"})),
    Fault("_remainder", "(quota - floor) * 1e9", "(floor - quota) * 1e9", frozenset({"apportion"})),
    Fault("apportion_kernel", "before < missing", "before <= missing", frozenset({"apportion"})),
    Fault("apportion_kernel", "weights += request", "weights += 0", frozenset({"apportion"})),
    Fault("_keys", "ordered_bits(score)", "ordered_bits(-score)", frozenset({"select"})),
    Fault("select_kernel", "number <= wanted", "number < wanted", frozenset({"select"})),
    Fault("select_kernel", "tl.program_id(2) * 9", "0 * 9", frozenset({"select"})),
    Fault("select_kernel", "- tl.ceil(recent)", "- tl.floor(recent)", frozenset({"select"})),
    Fault("ordered_bits", "score == 0, 0.0, score", "score < 0, -score, score", RANK),
    Fault(
        "_pass", "tl.cumsum(counts, 0) - counts", "tl.sum(counts, 0) - tl.cumsum(counts, 0)", RANK
    ),
    Fault("rank_kernel", "tl.maximum(before, value)", "value", frozenset({"merge_ranking"})),
    Fault(
        "rank_kernel",
        "place.to(tl.int64), mask",
        "place.to(tl.int64) + 1, mask",
        frozenset({"rank"}),
    ),
    Fault("_larger", "tl.maximum(a, b)", "b", frozenset({"look_ahead"})),
    Fault(
        "look_ahead_kernel",
        "tl.max(running, 0) * of_frame",
        "tl.max(running, 0)",
        frozenset({"look_ahead"}),
    ),
    Fault(
        "compact_kernel",
        "to_page + cell + to_token * value_token_stride, value",
        "to_page + cell + to_token * value_token_stride, 0 * value",
        frozenset({"compact"}),
    ),
    Fault(
        "compact_kernel",
        "ends <= page_index",
        "ends < page_index",
        frozenset({"compact", "compact: elsewhere"}),
    ),
    Fault("compact_kernel", "tl.program_id(2) * 8", "0 * 8", frozenset({"compact"})),
    Fault("compact_kernel", "layers < first_layer", "layers < 0", frozenset({"compact"})),
    Fault(
        "layer_tables_kernel",
        "kept_row + page_index // num_layers",
        "kept_row + 0 * page_index",
        frozenset({"layer_tables: pages"}),
    ),
    Fault(
        "layer_tables_kernel",
        "stored = kept * block_size + length - evicted",
        "stored = kept * block_size + length - evicted - 1",
        frozenset({"layer_tables: lengths", "layer_tables: pages"}),
    ),
    Fault(
        "layer_tables_kernel",
        "page_id * block_size + position % block_size",
        "page_id * block_size + position",
        frozenset({"layer_tables: slots"}),
    ),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}-{fault.after}")
def test_a_fault_fails_its_rows(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SyntheticPrompt.calls
    only = {
        "rank": {"rank", "merge_ranking"},
        "observe": {*OBSERVATIONS},
    }.get(fault.file, {fault.file})
    monkeypatch.setattr(  # the others cannot be affected, and the interpreter is slow
        SyntheticPrompt,
        "calls",
        lambda self: {name: call for name, call in calls(self).items() if name in only},
    )
    with planted(fault, tmp_path):
        found = names(failing(check(SMALL)))
    # A fault shows in a prompt's queries and in the one query of a later eviction.
    assert {name.removesuffix(" of one query") for name in found} == fault.rows


def test_every_kernel_has_a_fault() -> None:
    compiled = {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)
    }
    assert {fault.kernel for fault in FAULTS} == compiled


def _nan(result: torch.Tensor) -> None:
    result.view(-1)[0] = torch.nan


def _nan_sums(requests: list[RequestObservation]) -> None:
    _nan(requests[0].column_sums)


def _one_more(result: torch.Tensor) -> None:
    result.view(-1)[-1] += 1


@needs_cpp
@pytest.mark.parametrize(
    ("operation", "result", "change", "row"),
    [
        ("observe", 4, _nan, "observe: sums"),
        ("observe", 7, _nan, "observe: maxima"),
        ("observe", 5, lambda dense: dense.add_(9), "observe: dense entries"),
        ("observe_layers", 4, _nan_sums, "observe_layers: sums"),
        ("apportion", None, _one_more, "apportion"),
        ("select_all", None, lambda positions: positions[1][..., 0].add_(1), "select"),
        ("rank", None, _one_more, "rank"),
        ("merge_ranking", 0, _one_more, "merge_ranking"),
        ("look_ahead", None, _one_more, "look_ahead"),
        ("compact_all", 0, lambda pool: pool.pages.neg_(), "compact"),
        ("layer_tables", 5, lambda out: out.block_table.add_(1), "layer_tables: pages"),
        ("layer_tables", 5, lambda out: out.seq_lens.add_(1), "layer_tables: lengths"),
        ("layer_tables", 5, lambda out: _one_more(out.slot_mapping), "layer_tables: slots"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_result_fails_its_row(
    operation: str,
    result: int | None,
    change: Callable[[Any], Any],
    row: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every result of every operation; ``result``: index of an argument, None: what it returns."""
    synthetic = importlib.import_module("vl_cache_vllm.self_check.synthetic")
    original = getattr(synthetic, operation)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        returned = original(*args, **kwargs)
        if dispatch._forced == "cpp":
            change(returned if result is None else args[result])
        return returned

    monkeypatch.setattr(synthetic, operation, wrong)
    found = names(failing(check(SMALL[:1], "cpp")))
    assert row in found
    assert {name.partition(":")[0] for name in found} == {operation.removesuffix("_all")}


@needs_cpp
def test_an_operation_that_raises_fails() -> None:
    (row,) = failing(check((operations.CASES[2],), "cpp"))  # heads interleaved
    assert row.name == "compact"
    assert "C++" in row.note


def test_synthetic_inputs_are_copied() -> None:
    case = Case(AttentionShape(3, 4, 2, 16), 100, 16, heads_interleaved=True, budget=0.4)
    prompt = SyntheticPrompt(case, CPU)
    before = prompt.pool.pages.clone()
    copy = prompt.to(CPU)
    with dispatch.use("torch"):
        first, second = (
            {name: call() for name, call in each.calls().items()} for each in (copy, prompt.to(CPU))
        )
    assert torch.equal(prompt.pool.pages, before)
    assert not torch.equal(copy.pool.pages, before)
    for operation, results in first.items():
        for name, result in results.items():
            assert torch.equal(result, second[operation][name])
    assert not prompt.step[-1].seq_lens.any()


def test_timed_calls_are_those_of_an_eviction() -> None:
    case = Case(AttentionShape(2, 4, 2, 16), 160, 16, num_queries=8)
    found = SyntheticPrompt(case, CPU).operations()
    for operation in found:
        operation.run()
        assert operation.num_bytes > 0
    assert {one.name.partition(",")[0] for one in found} == {
        "observe",
        "observe_layers",
        "apportion",
        "look_ahead",
        "merge_ranking",
        "select",
        "compact",
        "layer_tables",
    }
