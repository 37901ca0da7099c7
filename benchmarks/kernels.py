# SPDX-License-Identifier: Apache-2.0
"""The device operations by themselves: right, how fast against their bytes, and as machine code.

    python -m benchmarks.kernels [--shapes 0.5b] [--tokens 2048 8192] [--json FILE]
    python -m benchmarks.kernels --compile [--json FILE]

Runs what the machine can: with a GPU, Triton's kernels are timed; without one, torch's operations
and the C++ ones; with ``TRITON_INTERPRET=1`` nothing is timed, the kernels are only compared with
torch's. Each time stands beside the least time in which its bytes can be moved, at the bandwidth of
a large copy on the same machine.

``--compile`` needs no GPU: it compiles Triton's kernels for each architecture and reports
registers, shared memory and what was spilled.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from testing.results import write_report
from vl_cache_vllm.ops import dispatch, native
from vl_cache_vllm.ops.apportion import apportion
from vl_cache_vllm.ops.compact import compact
from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables, layer_tables
from vl_cache_vllm.ops.observe import AttentionParams, observe
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePacking, PagePool
from vl_cache_vllm.ops.select import select

OBSERVED = 64  # queries
DECODING = 64  # requests of a step
THRESHOLD, RECENT_RATIO, BUDGET = 0.01, 0.1, 0.1
ARCHITECTURES = (80, 90, 100)
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of a language model's attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


SHAPES = {
    "0.5b": Shape(24, 14, 2, 64),  # Qwen2-0.5B
    "7b-mha": Shape(32, 32, 32, 128),  # LLaVA-1.5-7B
    "7b-gqa": Shape(32, 32, 8, 128),  # LLaVA-NeXT-Mistral-7B
    "tiny": Shape(3, 6, 2, 80),  # for the interpreter
}


@dataclass(frozen=True)
class Operation:
    """One call of a device operation, as an eviction or a step makes it."""

    name: str
    run: Callable[[], Any]
    num_bytes: int
    """Read and written at least."""


class Prompt:
    """A prompt in a pool of its own, with room for what is kept of it.

    Pages are laid out as on a GPU: a token's key and value of a head side by side.
    """

    def __init__(self, shape: Shape, tokens: int, block_size: int, device: torch.device) -> None:
        self.shape, self.tokens, self.block_size = shape, tokens, block_size
        on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        prompt_blocks = tokens // block_size
        self.kept_blocks = max(1, round(BUDGET * prompt_blocks))
        num_blocks = prompt_blocks + self.kept_blocks
        self.pool = PagePool(
            torch.randn(
                num_blocks * shape.num_layers,
                shape.num_kv_heads,
                block_size * 2 * shape.head_size,
                generator=generator,
                device=device,
                dtype=self.dtype,
            ),
            PagePacking.side_by_side(block_size, shape.head_size, 2 * shape.head_size),
            shape.num_layers,
            layer_stride=num_blocks,
            block_stride=1,
        )
        self.row = torch.randperm(num_blocks, generator=generator, device=device)
        self.query = torch.randn(
            OBSERVED,
            shape.num_heads,
            shape.head_size,
            generator=generator,
            device=device,
            dtype=self.dtype,
        )
        self.column_sums = torch.zeros(shape.num_layers, shape.num_kv_heads, tokens, device=device)
        self.dense_entries = torch.zeros(shape.num_layers, dtype=torch.int64, device=device)
        weights = torch.rand(shape.num_layers, generator=generator, device=device)
        self.weights = weights.double().clamp(min=0.01)
        self.total_pages = self.kept_blocks * shape.num_layers
        self.max_pages = min(prompt_blocks, self.total_pages - shape.num_layers + 1)
        self.kept_pages = apportion(self.weights, self.total_pages, prompt_blocks)
        self.scores = torch.rand(
            shape.num_layers, shape.num_kv_heads, tokens, generator=generator, device=device
        )
        self.positions = self.select()
        self.step = self._decode_step()

    def _decode_step(self) -> tuple[Any, ...]:
        """Arguments of `layer_tables` for a decode step of many evicted requests like this one."""
        device, shape, width = self.row.device, self.shape, self.max_pages + 1
        ones = torch.ones(DECODING, dtype=torch.int64, device=device)
        return (
            self.pool,
            EvictedRows(
                ones * self.tokens,
                ones * (self.tokens // self.block_size),
                ones * self.kept_blocks,
                self.kept_pages.expand(DECODING, -1).contiguous(),
            ),
            self.row.int().expand(DECODING, -1).contiguous(),
            torch.arange(DECODING + 1, dtype=torch.int32, device=device),
            (ones * (self.tokens + 1)).int(),
            LayerTables(
                torch.empty(shape.num_layers, DECODING, width, dtype=torch.int32, device=device),
                torch.empty(shape.num_layers, DECODING, dtype=torch.int32, device=device),
                torch.empty(shape.num_layers, DECODING, dtype=torch.int64, device=device),
            ),
        )

    def observe(self) -> torch.Tensor:
        """Of all layers."""
        params = AttentionParams(self.shape.head_size**-0.5, 0.0, THRESHOLD)
        for layer in range(self.shape.num_layers):
            observe(
                self.query,
                PagedKeys(self.pool, layer, self.row[: -self.kept_blocks]),
                self.tokens - OBSERVED,
                params,
                self.column_sums[layer],
                self.dense_entries[layer],
            )
        return self.column_sums

    def apportion(self) -> torch.Tensor:
        return apportion(self.weights, self.total_pages, self.tokens // self.block_size)

    def select(self) -> torch.Tensor:
        kept_tokens = self.kept_pages * self.block_size
        return select(self.scores, kept_tokens, RECENT_RATIO, self.max_pages * self.block_size)

    def compact(self) -> torch.Tensor:
        prompt_row, kept_row = self.row.split((len(self.row) - self.kept_blocks, self.kept_blocks))
        compact(self.pool, prompt_row, kept_row, self.kept_pages, self.positions)
        return self.pool.pages

    def layer_tables(self) -> torch.Tensor:
        layer_tables(*self.step)
        return self.step[-1].block_table

    def operations(self) -> list[Operation]:
        shape = self.shape
        heads = shape.num_layers * shape.num_kv_heads
        size = self.dtype.itemsize
        kept = self.total_pages * self.block_size * shape.num_kv_heads  # tokens of heads
        return [
            Operation(
                "observe",
                self.observe,
                heads * self.tokens * (shape.head_size * size + 8)  # keys; sums read and written
                + shape.num_layers * self.query.numel() * size,
            ),
            Operation("apportion", self.apportion, 16 * shape.num_layers),
            Operation("select", self.select, 4 * self.scores.numel() + 8 * kept),
            Operation("compact", self.compact, kept * (2 * 2 * shape.head_size * size + 8)),
            Operation(
                "layer_tables",
                self.layer_tables,
                shape.num_layers * DECODING * (4 * (self.max_pages + 1) + 12),
            ),
        ]


# --------------------------------------------------------------------------------------------------
# Right


def results(shape: Shape, tokens: int, block_size: int, device: torch.device) -> dict[str, Any]:
    """Of each operation, what it gives."""
    prompt = Prompt(shape, tokens, block_size, device)
    found = {operation.name: operation.run().clone() for operation in prompt.operations()}
    found["dense_entries"] = prompt.dense_entries
    shares = (prompt.kept_pages * block_size).tolist()
    kept = [row[:, :share] for row, share in zip(found["select"], shares, strict=True)]
    return found | {"select": torch.cat(kept, 1)}  # the rest is meaningless


def compare(implementation: dispatch.Implementation, device: torch.device) -> list[Row]:
    """An implementation beside torch's, on a small prompt of odd sizes.

    Raises:
        AssertionError: if they differ.
    """
    rows = []
    for block_size, tokens in ((16, 208), (32, 1056), (48, 624)):
        with dispatch.use("torch"):
            expected = results(SHAPES["tiny"], tokens, block_size, device)
        with dispatch.use(implementation):
            found = results(SHAPES["tiny"], tokens, block_size, device)
        for name, right in expected.items():
            exact = not right.is_floating_point() or name == "compact"
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(found[name], right, **tolerance)
            rows.append({"operation": name, "tokens": tokens, "block_size": block_size})
    return rows


# --------------------------------------------------------------------------------------------------
# Fast


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median of a call, after one that is not counted."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median")
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.zeros(
        1 << (31 if device.type == "cuda" else 27), dtype=torch.int8, device=device
    )
    target = torch.empty_like(source)
    return 2000 * len(source) / milliseconds(lambda: target.copy_(source), device)


def measure(options: argparse.Namespace, device: torch.device) -> tuple[float, list[Row]]:
    """The bandwidth, and the rows of every shape, length and implementation."""
    ceiling = bandwidth(device)
    names: list[dispatch.Implementation] = ["torch"]
    if device.type == "cuda":
        names.append("triton")
    elif native.is_built():
        names.append("cpp")
    rows = []
    for shape in options.shapes:
        for tokens in options.tokens:
            prompt = Prompt(SHAPES[shape], tokens, options.block_size, device)
            for operation in prompt.operations():
                for name in names:
                    with dispatch.use(name):
                        taken = milliseconds(operation.run, device)
                    row = {
                        "operation": operation.name,
                        "shape": shape,
                        "tokens": tokens,
                        "implementation": name,
                        "milliseconds": round(taken, 4),
                        "bytes": operation.num_bytes,
                        "bound_milliseconds": round(1000 * operation.num_bytes / ceiling, 4),
                    }
                    rows.append(row)
                    print(line(row), flush=True)
            del prompt
    return ceiling, rows


def line(row: Row) -> str:
    return (
        f"{row['operation']:<14}{row['shape']:<8}{row['tokens']:>8}{row['implementation']:>8}"
        f"{row['milliseconds']:>12.3f} ms{row['bound_milliseconds']:>12.4f} ms at least"
    )


# --------------------------------------------------------------------------------------------------
# As machine code

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was called with."""

    kernel: Any
    arguments: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels are not run but written down."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = self.arg_names
        launches.append(Launch(self, dict(zip(names, args, strict=False)) | kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_for(launch: Launch, architecture: int) -> Row:
    """Compile a launch as it would be on a GPU; what the machine code needs.

    Raises:
        RuntimeError: if the machine code cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_tensor = isinstance(value, torch.Tensor)
        is_special = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and is_special):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif is_tensor:
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        else:
            signature[parameter.name] = parameter.annotation_type or "fp32"
        if (place,) not in constants and (
            not parameter.do_not_specialize_on_alignment
            if is_tensor
            else isinstance(value, int) and value % 16 == 0 and is_special
        ):
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
    )
    return {
        "kernel": launch.kernel.__name__,
        "architecture": f"sm_{architecture}",
        **resources(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
    }


def resources(machine_code: bytes) -> Row:
    """Registers of a thread and bytes that it spills, by NVIDIA's tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    if match is None:
        raise RuntimeError(f"{' '.join(command)} said:\n{said}")
    registers, stack, local = map(int, match.groups())
    return {"registers": registers, "spilled_bytes": stack + local}


def launches(shape: Shape) -> list[Launch]:
    """Of every kernel, once, as an eviction of a model of this shape makes it."""
    # As on a GPU, but small: addresses and types matter, not contents.
    prompt = Prompt(shape, 512, 16, torch.device("cpu"))
    prompt.query = prompt.query.bfloat16()
    prompt.pool = replace(prompt.pool, pages=prompt.pool.pages.bfloat16())
    with dispatch.use("triton"), recorded() as found:
        for operation in prompt.operations():
            operation.run()
    return list({launch.kernel.__name__: launch for launch in found}.values())


def compile_all(options: argparse.Namespace) -> list[Row]:
    rows = []
    for shape in options.shapes:
        for launch in launches(SHAPES[shape]):
            for architecture in options.architectures:
                row = {"shape": shape, **compile_for(launch, architecture)}
                rows.append(row)
                print(
                    f"{row['kernel']:<22}{shape:<8}{row['architecture']:<8}"
                    f"{row['registers']:>5} registers{row['spilled_bytes']:>6} bytes spilled"
                    f"{row['shared_bytes']:>8} bytes shared",
                    flush=True,
                )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=sorted(SHAPES), help="default: what fits the machine")
    add("--tokens", type=int, nargs="+", default=[2048, 8192], help="of the prompt")
    add("--block-size", type=int, default=32)
    add("--compile", action="store_true", help="compile Triton's kernels, run nothing")
    add("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    add("--json", type=Path, metavar="FILE", help="write the results here")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    report: Row
    if options.compile:
        options.shapes = options.shapes or ["0.5b", "7b-mha", "7b-gqa"]
        report = {"compiled": compile_all(options)}
    elif interpreted:
        report = {"agree": compare("triton", device)}
        print(f"Triton's kernels agree with torch in {len(report['agree'])} cases")
    else:
        options.shapes = options.shapes or (
            ["7b-mha", "7b-gqa"] if device.type == "cuda" else ["0.5b"]
        )
        report = {}
        if device.type == "cuda":
            report["agree"] = compare("triton", device)
        elif native.is_built():
            report["agree"] = compare("cpp", device)
        report["bytes_per_second"], report["rows"] = measure(options, device)
    if options.json:
        write_report(options.json, "benchmarks.kernels", arguments, **report)


if __name__ == "__main__":
    main()
