# SPDX-License-Identifier: Apache-2.0
"""The device operations in isolation: correctness, time against the bandwidth bound, machine code.

    python -m benchmarks.kernels [--shapes 0.5b] [--tokens 2048 8192] [--json FILE]
    python -m benchmarks.kernels --compile [--json FILE]

The machine determines what runs. With a GPU, the torch and the Triton operations are timed;
without one, the torch and the C++ operations. With ``TRITON_INTERPRET=1`` nothing is timed, and the
Triton kernels are only compared with the torch operations. Each time is reported with its
memory-bandwidth bound: the bytes of the operation divided by the bandwidth of a large copy on the
same machine.

``--compile`` needs no GPU. It compiles the Triton kernels for several GPU architectures and reports
registers, shared memory and spilled bytes.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from testing.cli import make_parser
from testing.results import Row, write_report
from vl_cache_vllm.ops import dispatch, native
from vl_cache_vllm.ops.apportion import apportion
from vl_cache_vllm.ops.compact import compact
from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables, layer_tables
from vl_cache_vllm.ops.observe import AttentionParams, observe
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePacking, PagePool
from vl_cache_vllm.ops.select import select

OBSERVED = 64  # queries in the observation window
DECODING = 64  # requests in a decode step
THRESHOLD, RECENT_RATIO, BUDGET = 0.01, 0.1, 0.1
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a language model's attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


ATTENTION_SHAPES = {
    "0.5b": AttentionShape(24, 14, 2, 64),  # Qwen2-0.5B
    "7b-mha": AttentionShape(32, 32, 32, 128),  # LLaVA-1.5-7B
    "7b-gqa": AttentionShape(32, 32, 8, 128),  # LLaVA-NeXT-Mistral-7B
    "tiny": AttentionShape(3, 6, 2, 80),  # for the interpreter
}


@dataclass(frozen=True)
class Operation:
    """One call of a device operation, as made by an eviction or a step."""

    name: str
    run: Callable[[], Any]
    num_bytes: int
    """Minimum number of bytes that it reads and writes."""


class SyntheticPrompt:
    """A prompt of random keys and values in its own pool, with blocks for its kept pages.

    Pages have the GPU layout: the key and the value of a token and head are adjacent.
    """

    def __init__(
        self, shape: AttentionShape, tokens: int, block_size: int, device: torch.device
    ) -> None:
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
        kept = self.total_pages * self.block_size * shape.num_kv_heads  # (token, head) pairs
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
# Correctness


def results(
    shape: AttentionShape, tokens: int, block_size: int, device: torch.device
) -> dict[str, Any]:
    """The result of each operation, by name."""
    prompt = SyntheticPrompt(shape, tokens, block_size, device)
    found = {operation.name: operation.run().clone() for operation in prompt.operations()}
    found["dense_entries"] = prompt.dense_entries
    shares = (prompt.kept_pages * block_size).tolist()
    kept = [row[:, :share] for row, share in zip(found["select"], shares, strict=True)]
    return found | {"select": torch.cat(kept, 1)}  # entries beyond these are undefined


def compare(implementation: dispatch.Implementation, device: torch.device) -> list[Row]:
    """Compare an implementation with torch's on small prompts of odd sizes.

    Raises:
        AssertionError: if they differ.
    """
    rows = []
    for block_size, tokens in ((16, 208), (32, 1056), (48, 624)):
        with dispatch.use("torch"):
            expected = results(ATTENTION_SHAPES["tiny"], tokens, block_size, device)
        with dispatch.use(implementation):
            found = results(ATTENTION_SHAPES["tiny"], tokens, block_size, device)
        for name, right in expected.items():
            exact = not right.is_floating_point() or name == "compact"
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(found[name], right, **tolerance)
            rows.append({"operation": name, "tokens": tokens, "block_size": block_size})
    return rows


# --------------------------------------------------------------------------------------------------
# Time


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median time of a call, after a warm-up call."""
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
    """The bandwidth, and one row for each shape, length, operation and implementation."""
    ceiling = bandwidth(device)
    names: list[dispatch.Implementation] = ["torch"]
    if device.type == "cuda":
        names.append("triton")
    elif native.is_built():
        names.append("cpp")
    rows = []
    for shape in options.shapes:
        for tokens in options.tokens:
            prompt = SyntheticPrompt(ATTENTION_SHAPES[shape], tokens, options.block_size, device)
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
    """A printed line of one row."""
    return (
        f"{row['operation']:<14}{row['shape']:<8}{row['tokens']:>8}{row['implementation']:>8}"
        f"{row['milliseconds']:>12.3f} ms{row['bound_milliseconds']:>12.4f} ms bound"
    )


# --------------------------------------------------------------------------------------------------
# Machine code

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
    """A kernel and its arguments."""

    kernel: Any
    arguments: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record kernel launches instead of running the kernels."""
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
    """Compile a kernel with the specialisation of a launch and report its resources.

    Args:
        launch: the kernel with its arguments.
        architecture: compute capability, such as 90 for sm_90.

    Raises:
        RuntimeError: if the resources of the machine code cannot be read.
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
    """Registers and spilled bytes of a thread, from the ``cuobjdump`` that Triton includes."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", output)
    if match is None:
        raise RuntimeError(f"{' '.join(command)} printed:\n{output}")
    registers, stack, local = map(int, match.groups())
    return {"registers": registers, "spilled_bytes": stack + local}


def launches(shape: AttentionShape) -> list[Launch]:
    """One launch of each kernel, as made by an eviction in a model of this shape."""
    # Types and layout as on a GPU. The contents do not matter, so the prompt is small.
    prompt = SyntheticPrompt(shape, 512, 16, torch.device("cpu"))
    prompt.query = prompt.query.bfloat16()
    prompt.pool = replace(prompt.pool, pages=prompt.pool.pages.bfloat16())
    with dispatch.use("triton"), recorded() as found:
        for operation in prompt.operations():
            operation.run()
    return list({launch.kernel.__name__: launch for launch in found}.values())


def compile_all(options: argparse.Namespace) -> list[Row]:
    """One row for each shape, kernel and architecture."""
    rows = []
    for shape in options.shapes:
        for launch in launches(ATTENTION_SHAPES[shape]):
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
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        choices=sorted(ATTENTION_SHAPES),
        help="default: depends on the machine",
    )
    add("--tokens", type=int, nargs="+", default=[2048, 8192], help="prompt lengths")
    add("--block-size", type=int, default=32)
    add("--compile", action="store_true", help="only compile the Triton kernels")
    add("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    report: Row
    if options.compile:
        options.shapes = options.shapes or ["0.5b", "7b-mha", "7b-gqa"]
        report = {"compiled": compile_all(options)}
    elif interpreted:
        report = {"agree": compare("triton", device)}
        print(f"Triton kernels agree with torch in {len(report['agree'])} cases")
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
