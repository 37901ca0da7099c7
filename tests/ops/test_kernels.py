# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels as machine code: what compiles here runs on a GPU without spilling.

That they are right is tested with the operations, through the interpreter.
"""

import functools
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernels
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.policy import Attention, Prompt
from vl_cache_vllm.policy.vlcache_plus import VLCachePlusPolicy
from vl_cache_vllm.self_check import operations, synthetic
from vl_cache_vllm.self_check.synthetic import Case, SyntheticPrompt

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled for the interpreter"
)

PROGRAMS_PER_SM = {
    "layer_tables_kernel": 4,
    "rank_kernel": 4,
    "look_ahead_kernel": 8,
    "select_kernel": 6,
    "compact_kernel": 16,
}
"""Programs that must fit on an SM at once, since these kernels wait for memory."""


@dataclass(frozen=True)
class Budget:
    """Limits of an observation kernel for a tile of 64 keys and heads of size 128."""

    instructions: tuple[int, ...]
    """Of a thread and a tile, on each of `kernels.ARCHITECTURES`."""
    programs: int
    """Programs that must fit on an SM at once."""


OBSERVATION_BUDGETS = {
    ("statistics_kernel", 64, False): Budget((490, 400, 360), programs=4),
    ("columns_kernel", 64, False): Budget((450, 370, 320), programs=3),
    ("columns_kernel", 64, True): Budget((510, 430, 360), programs=2),
    ("statistics_kernel", 16, False): Budget((310, 310, 300), programs=7),
    ("columns_kernel", 16, False): Budget((175, 175, 170), programs=4),
    ("columns_kernel", 16, True): Budget((195, 195, 185), programs=4),
}
"""By kernel, rows of a tile, and whether maxima are computed. They issue instructions all the time,
so their time grows with the instructions of the loop."""

SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Shared memory of an SM, of which each program reserves 1 KB."""


@needs_compiler
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
@pytest.mark.parametrize("shape", ["0.5b", "7b-gqa"])
def test_all_compile_without_spilling(shape: str, architecture: int) -> None:
    found = [
        kernels.compile_for(one, architecture)
        for one in kernels.launches(kernels.ATTENTION_SHAPES[shape])
    ]
    assert {row["kernel"] for row in found} == {
        "layer_tables_kernel",
        "statistics_kernel",
        "combine_kernel",
        "columns_kernel",
        "statistics_of_step_kernel",
        "columns_of_step_kernel",
        "apportion_kernel",
        "look_ahead_kernel",
        "rank_kernel",
        "select_kernel",
        "compact_kernel",
    }
    for row in found:
        assert row["registers"] > 0
        assert row["spilled_bytes"] == 0, row
        # Programs of 128 threads; an SM has 65536 registers and at least 100 KB of shared memory.
        if (programs := PROGRAMS_PER_SM.get(row["kernel"])) is not None:
            assert 128 * row["registers"] * programs <= 65536, row
            assert row["shared_bytes"] * programs <= 100 << 10, row


@needs_compiler
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
def test_large_heads_fit_any_gpu(architecture: int) -> None:
    """Those of Gemma 4's full attention, in the 99 KB that a program has on the smallest GPUs."""
    shape = replace(kernels.ATTENTION_SHAPES["7b-gqa"], num_heads=8, num_kv_heads=1, head_size=512)
    found = [
        kernels.compile_for(one, architecture)
        for one in kernels.launches(shape)
        if one.kernel.__name__.startswith(("statistics_", "columns_"))
    ]
    for row in found:
        assert row["rows"] == 16
        assert row["shared_bytes"] <= 99 << 10, row
        assert row["spilled_bytes"] <= 16, row
        assert row["loop_async_copies"] > 0, row


@functools.cache
def observation_kernels(architecture: int) -> list[dict[str, Any]]:
    return [
        kernels.compile_for(one, architecture)
        for one in kernels.launches(kernels.ATTENTION_SHAPES["7b-gqa"])
        if one.kernel.__name__.startswith(("statistics_", "columns_"))
    ]


@needs_compiler
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
def test_observation_issues_few_instructions(architecture: int) -> None:
    found = {
        (row["kernel"], row["rows"], row["maxima"]): row
        for row in observation_kernels(architecture)
    }
    # The kernels of a step run the same loops as those of a layer.
    budgets = {
        (name.replace("_kernel", entry), *variant): budget
        for (name, *variant), budget in OBSERVATION_BUDGETS.items()
        for entry in ("_kernel", "_of_step_kernel")
    }
    assert found.keys() == budgets.keys()
    for variant, budget in budgets.items():
        row = found[variant]
        limit = budget.instructions[kernels.ARCHITECTURES.index(architecture)]
        assert row["loop_instructions"] <= limit, row
        assert 128 * row["registers"] * budget.programs <= 65536, row
        assert (row["shared_bytes"] + 1024) * budget.programs <= SHARED_BYTES[architecture], row


@needs_compiler
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
def test_observation_is_pipelined(architecture: int) -> None:
    """A tile is copied while the one before it is computed."""
    for row in observation_kernels(architecture):
        assert row["loop_async_copies"] > 0, row


@needs_compiler
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
def test_both_passes_of_an_observation_multiply_alike(architecture: int) -> None:
    """Entries are dense at a threshold of 1 if both passes compute the same bits."""
    for rows in (16, 64):
        products = [
            row["matrix_products"]
            for row in observation_kernels(architecture)
            if row["rows"] == rows
        ]
        assert len(products) == 6
        assert all(one == products[0] for one in products)


def test_the_hot_loop_is_the_shortest_around_a_matrix_product() -> None:
    found = kernels.hot_loop(
        """
        /*0000*/                   S2R R0, SR_TID.X ;          /* 0x0000000000007919 */
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P1 BRA 0x10 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R141], [R124.64], P3 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/              @!P0 BRA 0x30 ;
        /*0070*/               @P0 BRA 0x90 ;
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/              @!P0 BRA 0x80 ;
        /*00a0*/                   BRA 0x30 ;
        /*00b0*/                   BRA 0xb0;
        """
    )
    assert found == {
        "loop_instructions": 4,
        "loop_async_copies": 1,
        "matrix_products": ["HGMMA.64x64x16.F32.BF16"],
    }
    assert kernels.hot_loop("/*0000*/ NOP ;\n/*0010*/ BRA 0x0 ;") == {}


@needs_compiler
def test_long_tables_take_few_iterations() -> None:
    """The cache of 128K tokens has 8,192 pages of 16, and each iteration waits for memory."""
    (launch,) = [
        one
        for one in kernels.launches(kernels.ATTENTION_SHAPES["7b-gqa"])
        if one.kernel.__name__ == "layer_tables_kernel"
    ]
    assert 8192 / launch.arguments["BLOCK"] <= 8


def specialisation(launch: kernels.Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel for: constants, and what it reads off the arguments."""
    found: list[Any] = [launch.kernel.__name__]
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            found.append(value)
        elif isinstance(value, torch.Tensor):
            is_aligned = value.data_ptr() % 16 == 0
            found.append((value.dtype, is_aligned or parameter.do_not_specialize_on_alignment))
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found.append((value == 1, value % 16 == 0))
    return tuple(found)


@needs_compiler
def test_lengths_of_prompts_are_not_compiled_in() -> None:
    """Every size but those that change the tiles finds the kernels of the others."""
    shape = synthetic.AttentionShape(3, 6, 2, 64)
    compiled: set[tuple[Any, ...]] = set()
    numbers = []
    for tokens, num_queries in ((208, 20), (335, 21), (97, 22), (1601, 33), (800, 48)):
        prompt = SyntheticPrompt(Case(shape, tokens, 16, num_queries), torch.device("cpu"))
        with dispatch.use("triton"), kernels.recorded() as launches:
            prompt.observe()
            prompt.observe_layers()
        compiled |= {specialisation(launch) for launch in launches}
        numbers.append(len(compiled))
    assert numbers == [numbers[0]] * 5, sorted(map(str, compiled))


class _NoSorting(TorchDispatchMode):
    """Raises if torch sorts or scans."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {"sort", "argsort", "topk", "cummax"} & {func.overloadpacket.__name__}, func
        return func(*args, **(kwargs or {}))


@needs_compiler
@pytest.mark.parametrize("tokens", [70, 5000])
def test_rankings_take_a_launch_each_and_no_sort(tokens: int) -> None:
    policy, sums = VLCachePlusPolicy(), torch.rand(2, 3, tokens)
    attention = Attention(sums, torch.rand(2, 3, tokens)).with_common()
    with dispatch.use("triton"), kernels.recorded() as launches, _NoSorting():
        policy.token_scores(attention, Prompt(tokens, ((5, 50),)))
    assert Counter(launch.kernel.__name__ for launch in launches) == {
        "look_ahead_kernel": 4,
        "rank_kernel": 4,
    }
    with dispatch.use("torch"), _NoSorting(), pytest.raises(AssertionError):
        policy.token_scores(attention, Prompt(tokens))


@needs_compiler
def test_a_ratio_of_recent_tokens_is_not_compiled_in() -> None:
    """Nothing of a request is, except whether it has precedences."""
    from vl_cache_vllm.kernels.select import select_kernel

    given = {one.name: one.is_constexpr for one in select_kernel.params}
    assert given == {"candidates": False, "HAS_PRECEDENCE": True, "BLOCK": True}


def test_the_benchmark_compares_every_operation() -> None:
    found = kernels.compare("torch", torch.device("cpu"))
    assert {row["name"].partition(":")[0] for row in found} == {
        "observe",
        "observe_layers",
        "apportion",
        "select",
        "rank",
        "merge_ranking",
        "look_ahead",
        "compact",
        "layer_tables",
    }


@pytest.mark.parametrize("change", ["sums", "maxima"])
def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    original = synthetic.SyntheticPrompt.observe
    calls = 0

    @functools.wraps(original)
    def wrong(self: synthetic.SyntheticPrompt) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = original(self)
        if calls % 2 == 0:
            found[change][..., 0] *= 1.01
        return found

    monkeypatch.setattr(synthetic.SyntheticPrompt, "observe", wrong)
    with pytest.raises(AssertionError, match=f"observe: {change}"):
        kernels.compare("torch", torch.device("cpu"))


@pytest.mark.parametrize(("fraction", "passes"), [(5e-5, True), (1e-3, False)])
def test_dense_entries_may_differ_at_the_threshold(
    monkeypatch: pytest.MonkeyPatch, fraction: float, passes: bool
) -> None:
    """Two orders of summation differ there, so equality would fail for no fault."""
    case = operations.CASES[3]
    entries = case.shape.num_heads * case.num_queries * case.tokens
    original = synthetic.SyntheticPrompt.observe
    calls = 0

    @functools.wraps(original)
    def counted(self: synthetic.SyntheticPrompt) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = original(self)
        found["dense entries"] += round((calls % 2) * fraction * entries)
        return found

    monkeypatch.setattr(synthetic.SyntheticPrompt, "observe", counted)
    rows = [*operations.compare([case], torch.device("cpu"), "torch")]
    assert all(row.passed for row in rows) == passes


def test_times_have_bounds() -> None:
    device = torch.device("cpu")
    shape = synthetic.ATTENTION_SHAPES["0.5b"]
    rows = [*kernels.measure("0.5b", 128, [4, 8], 16, ["torch"], device, ceiling=1e9)]
    observed = [(row["operation"], row["queries"]) for row in rows]
    assert ("observe", 8) in observed and ("select", 4) in observed
    assert ("select", 8) not in observed
    sums = 8 * shape.num_layers * shape.num_kv_heads * 128
    keys = shape.num_layers * 4 * shape.head_size * (shape.num_kv_heads * 128)
    queries = shape.num_layers * 4 * shape.head_size * (shape.num_heads * 4)
    assert rows[0]["bytes"] == sums + keys + queries
    assert all(row["milliseconds"] > 0 for row in rows)
    assert "observe" in kernels.line(rows[0])
