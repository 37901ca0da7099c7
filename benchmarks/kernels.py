# SPDX-License-Identifier: Apache-2.0
"""The device operations in isolation: correctness, time against the bandwidth bound, machine code.

    python -m benchmarks.kernels [--shapes 0.5b] [--tokens 2048 8192] [--json FILE]
    python -m benchmarks.kernels --compile [--json FILE]

The machine determines what runs. With a GPU, the torch and the Triton operations are timed;
without one, the torch and the C++ operations. With ``TRITON_INTERPRET=1`` nothing is timed, and the
Triton kernels are only compared with the torch operations. Each time is reported with its
memory-bandwidth bound: the bytes of the operation divided by the bandwidth of a large copy on the
same machine. Times include launches; on a GPU those on the device, without the host, are reported
too.

``--compile`` needs no GPU. It compiles the Triton kernels for several GPU architectures and reports
registers, shared memory, spilled bytes and the instructions of the loops around matrix products.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from testing.cli import make_parser
from testing.results import Row, write_report
from vl_cache_vllm.ops import dispatch, native
from vl_cache_vllm.self_check import operations
from vl_cache_vllm.self_check.operations import CASES, bandwidth, device_milliseconds
from vl_cache_vllm.self_check.rows import failing
from vl_cache_vllm.self_check.synthetic import (
    ATTENTION_SHAPES,
    AttentionShape,
    Case,
    SyntheticPrompt,
)

ARCHITECTURES = (80, 90, 100)
DECODING = 64  # requests in a decode step


def compare(implementation: dispatch.Implementation, device: torch.device) -> list[Row]:
    """Compare an implementation with torch's on small prompts of odd sizes.

    Raises:
        AssertionError: if they differ.
    """
    # On CPUs, a head's tokens lie together.
    cases = [case for case in CASES if implementation != "cpp" or not case.heads_interleaved]
    rows = [*operations.compare(cases, device, implementation)]
    assert not failing(rows), "\n".join(map(str, failing(rows)))
    return [vars(row) for row in rows]


# --------------------------------------------------------------------------------------------------
# Time


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median time of a call with its launches, after a warm-up call."""
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


def bytes_per_second(device: torch.device) -> float:
    """What a large copy reads and writes."""
    if device.type == "cuda":
        return bandwidth(device)
    source = torch.zeros(1 << 27, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2000 * len(source) / milliseconds(lambda: target.copy_(source), device)


def measure(
    shape: str,
    tokens: int,
    queries: Sequence[int],
    block_size: int,
    implementations: Sequence[dispatch.Implementation],
    device: torch.device,
    ceiling: float,
) -> Iterator[Row]:
    """Rows of one shape and length; those of `observe` for every number of observed queries.

    Args:
        shape: of `ATTENTION_SHAPES`.
        tokens: of the prompt.
        queries: numbers of observed queries.
        block_size: tokens of a page.
        implementations: to time.
        device: where.
        ceiling: bytes per second of a large copy.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for number in queries:
        case = Case(
            ATTENTION_SHAPES[shape], tokens, block_size, number, dtype=dtype, decoding=DECODING
        )
        prompt = SyntheticPrompt(case, device)
        for operation in prompt.operations():
            if number != queries[0] and not operation.name.startswith("observe"):
                continue
            for name in implementations:
                with dispatch.use(name):
                    row = {
                        "operation": operation.name,
                        "shape": shape,
                        "tokens": tokens,
                        "queries": number,
                        "implementation": name,
                        "milliseconds": round(milliseconds(operation.run, device), 4),
                        "bytes": operation.num_bytes,
                        "bound_milliseconds": round(1000 * operation.num_bytes / ceiling, 4),
                    }
                    if on_gpu and name == "triton":
                        taken = device_milliseconds(operation.run, in_graph=not operation.copies)
                        row["device_milliseconds"] = round(taken, 4)
                yield row
        del prompt


def line(row: Row) -> str:
    """A printed line of one row."""
    text = (
        f"{row['operation']:<17}{row['shape']:<8}{row['tokens']:>7}{row['queries']:>6}"
        f"{row['implementation']:>8}{row['milliseconds']:>11.3f} ms"
        f"{row['bound_milliseconds']:>10.4f} ms bound"
    )
    if "device_milliseconds" in row:
        text += f"{row['device_milliseconds']:>11.3f} ms on the device"
    return text


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


_OPTIONS = {"num_warps", "num_stages", "maxnreg"}  # of the compiler


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
        options={name: launch.arguments[name] for name in _OPTIONS & launch.arguments.keys()},
    )
    constants = launch.arguments
    return {
        "kernel": launch.kernel.__name__,
        "rows": constants.get("ROWS"),
        "maxima": constants.get("HAS_MAXIMA", False),
        "architecture": f"sm_{architecture}",
        **resources(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
    }


def resources(machine_code: bytes) -> Row:
    """What machine code takes, from the ``cuobjdump`` that Triton includes.

    Returns:
        Registers and spilled bytes of a thread, and what `hot_loop` finds.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()

        def dump(option: str) -> str:
            command = [str(tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, instructions = dump("--dump-resource-usage"), dump("--dump-sass")
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"{tool} printed:\n{usage}")
    registers, stack, local = map(int, match.groups())
    return {"registers": registers, "spilled_bytes": stack + local, **hot_loop(instructions)}


_MATRIX_PRODUCT = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\S*")


def hot_loop(instructions: str) -> Row:
    """Describe the shortest loop around a matrix product, the one that most iterations run.

    Args:
        instructions: disassembled machine code, one line ``/*address*/ instruction ;`` each.

    Returns:
        Instructions and asynchronous copies of the loop, the latter a sign that the compiler
        pipelined it, and the kinds of its matrix products. Empty without such a loop.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?) ?;", instructions)
    code = {int(address, 16): text for address, text in lines}
    loops = []
    for end, text in code.items():
        jump = re.search(r"\bBRA\b.* (0x[0-9a-f]+)$", text)
        if jump is not None and (start := int(jump[1], 16)) < end:
            body = [code[address] for address in code if start <= address <= end]
            products = {found[0] for one in body if (found := _MATRIX_PRODUCT.search(one))}
            if products:
                loops.append((len(body), sum("LDGSTS" in one for one in body), products))
    if not loops:
        return {}
    length, copies, products = min(loops, key=lambda loop: loop[0])
    return {
        "loop_instructions": length,
        "loop_async_copies": copies,
        "matrix_products": sorted(products),
    }


def launches(shape: AttentionShape) -> list[Launch]:
    """One launch of each kernel and variant, as made by an eviction in a model of this shape.

    Some observe many rows, the others one query.
    """
    found: dict[tuple[Any, ...], Launch] = {}
    for num_queries in (64, 1):
        # Types and layout as on a GPU. The contents do not matter, so the prompt is small.
        prompt = SyntheticPrompt(Case(shape, 512, 16, num_queries), torch.device("cpu"))
        with dispatch.use("triton"), recorded() as launched:
            for operation in prompt.operations():
                operation.run()
        for launch in launched:
            constants = (
                launch.arguments[one.name] for one in launch.kernel.params if one.is_constexpr
            )
            found[launch.kernel.__name__, *constants] = launch
    return list(found.values())


def compile_all(options: argparse.Namespace) -> list[Row]:
    """One row for each shape, kernel, variant and architecture."""
    rows = []
    for shape in options.shapes:
        for launch in launches(ATTENTION_SHAPES[shape]):
            for architecture in options.architectures:
                row = {"shape": shape, **compile_for(launch, architecture)}
                rows.append(row)
                text = (
                    f"{row['kernel']:<22}{shape:<8}{row['architecture']:<8}"
                    f"{row['registers']:>5} registers{row['spilled_bytes']:>6} bytes spilled"
                    f"{row['shared_bytes']:>8} bytes shared"
                )
                if "loop_instructions" in row:
                    text += (
                        f"{row['loop_instructions']:>6} instructions a tile of {row['rows']} rows"
                        f"{', maxima' if row['maxima'] else ''}"
                    )
                print(text, flush=True)
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
    add("--queries", type=int, nargs="+", default=[64], help="observed queries")
    add("--block-size", type=int, default=32)
    add("--compile", action="store_true", help="only compile the Triton kernels")
    add("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    report: Row = {}
    if options.compile:
        options.shapes = options.shapes or ["0.5b", "7b-mha", "7b-gqa"]
        report = {"compiled": compile_all(options)}
    elif interpreted:
        report = {"agree": compare("triton", device)}
        print(f"Triton kernels agree with torch in {len(report['agree'])} cases")
    else:
        on_gpu = device.type == "cuda"
        shapes = options.shapes or (["7b-mha", "7b-gqa"] if on_gpu else ["0.5b"])
        fast: dispatch.Implementation = "triton" if on_gpu else "cpp"
        implementations: list[dispatch.Implementation] = ["torch"]
        if on_gpu or native.is_built():
            report["agree"] = compare(fast, device)
            implementations.append(fast)
        ceiling = report["bytes_per_second"] = bytes_per_second(device)
        report["rows"] = []
        for shape in shapes:
            for tokens in options.tokens:
                for row in measure(
                    shape,
                    tokens,
                    options.queries,
                    options.block_size,
                    implementations,
                    device,
                    ceiling,
                ):
                    report["rows"].append(row)
                    print(line(row), flush=True)
    if options.json:
        write_report(options.json, "benchmarks.kernels", arguments, **report)


if __name__ == "__main__":
    main()
