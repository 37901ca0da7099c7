# SPDX-License-Identifier: Apache-2.0
"""Serving benchmark: ``vllm serve`` without and with eviction, on equal workloads.

    python -m benchmarks.serving --profile cpu [--json FILE] [--plot FILE]
    python -m benchmarks.serving --model MODEL --image-size 336 --images 1 2 --output-len 128 512 \\
        --request-rate 1 2 4 inf --num-prompts 200 -- --gpu-memory-utilization 0.9

Starts ``vllm serve`` twice, without eviction ("stock" in the results, the baseline) and with
``--kv-compress`` ("ours", eviction). Both get the same requests from vLLM's client, ``vllm bench
serve``. The first number of images with the last output length is offered at every request rate.
Other output lengths and numbers of images are offered at the highest rate only. ``--repeats``
repeats everything with the order of the servers reversed; the results are medians. Arguments after
``--`` go to both servers.

Outputs have exactly the requested length, as is usual in vLLM's benchmarks. With ``--end-early``
the model ends them, and the scheduler does not know their length in advance.

A profile is a set of defaults. On two cores ``cpu`` takes 10 to 20 minutes. ``cpu-ample``, whose
pool limits neither server, and ``cpu-early``, whose outputs end early, take 7 minutes each. On
shared cores they take twice as long.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report, shape
from testing import server, tiny_models
from testing.cli import make_parser
from testing.results import Row, write_report

SAMPLED = {  # name in the results: name in /metrics
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "evicted_requests": "vllm:kv_compress_evicted_requests_total",
}
TOTALS = ("preemptions", "generated_tokens", "evicted_requests")
ARMS = ("stock", "ours")  # baseline and eviction
MEAN_OUTPUT_FRACTION = 0.25  # of --output-len, for outputs of dummy weights that end early
MAX_SERIES_POINTS = 60

_CPU: dict[str, Any] = {
    "images": [2, 1],
    "image_size": shape.IMAGE_SIZE,
    "output_len": [16, 128, 512],
    "request_rate": [0.1, 0.2, math.inf],
    "seconds": 15.0,
    "num_prompts": 12,
    "other_prompts": 3,
    "server_arguments": [
        "--load-format=dummy",
        "--block-size=32",
        "--max-model-len=4096",
        "--max-num-seqs=64",
        "--gpu-memory-utilization=0.5",  # fraction of the memory that must be free
        "--num-gpu-blocks-override=192",  # two prompts of two images with their outputs
    ],
}
PROFILES: dict[str, dict[str, Any]] = {
    "cpu": _CPU,
    "cpu-ample": _CPU
    | {
        "images": [2],
        "output_len": [128, 512],
        "request_rate": [math.inf],
        "other_prompts": None,
        "server_arguments": [*_CPU["server_arguments"], "--num-gpu-blocks-override=2048"],
    },
    "cpu-early": _CPU
    | {
        "images": [2],
        "output_len": [512],
        "request_rate": [math.inf],
        "num_prompts": 24,
        "end_early": True,
    },
    # Three images: about the prompt length of the paper, 2.9K tokens.
    **{
        f"gpu-{name}": {
            "shape": name,
            "images": [3, 1],
            "image_size": shape.IMAGE_SIZE,
            "output_len": [16, 256],
            "request_rate": [2.0, 8.0, math.inf],
            "seconds": 20.0,
            "num_prompts": 160,
            "server_arguments": [
                "--load-format=dummy",
                "--max-model-len=8192",
                "--max-num-seqs=256",
                f"--kv-cache-memory-bytes={gib << 30}",  # about twelve of these prompts
            ],
        }
        for name, gib in (("7b-mha", 20), ("7b-gqa", 5))
    },
}


@dataclass(frozen=True)
class Point:
    """One workload at one load."""

    images: int
    output_len: int
    request_rate: float
    """Requests per second with Poisson arrivals; ``inf`` sends all at once."""
    num_prompts: int
    ends_early: bool = False

    def __str__(self) -> str:
        bound = "at most " if self.ends_early else ""
        return (
            f"{self.images} images, {bound}{self.output_len} output tokens, "
            f"{self.request_rate} requests/s"
        )

    def as_json(self) -> dict[str, Any]:
        """The fields, with the rate as text because JSON has no infinity."""
        return {**vars(self), "request_rate": str(self.request_rate)}


def points(options: argparse.Namespace) -> list[Point]:
    """One workload at every load, then variations of it at the highest load."""
    first, longest = options.images[0], options.output_len[-1]
    highest = max(options.request_rate)
    found = []
    for rate in sorted(options.request_rate):
        count = options.num_prompts
        if rate != math.inf and options.seconds:
            count = max(1, min(count, round(rate * options.seconds)))
        found.append(Point(first, longest, rate, count, options.end_early))
    others = [(first, output_len) for output_len in reversed(options.output_len[:-1])]
    others += [(images, longest) for images in options.images[1:]]
    count = options.other_prompts or options.num_prompts
    return found + [Point(*other, highest, count, options.end_early) for other in others]


def write_workload(path: Path, point: Point, image_size: int, first: int) -> None:
    """Write the requests of a point for the client.

    Args:
        path: JSONL file to write.
        point: number of requests and of images.
        image_size: pixels a side.
        first: seed of the first image; every image has a seed of its own.
    """
    with path.open("w") as file:
        for number in range(point.num_prompts):
            seeds = range(first + number * point.images, first + (number + 1) * point.images)
            images = (tiny_models.random_image(seed, (image_size, image_size)) for seed in seeds)
            content = server.chat_content(shape.QUESTION, *map(server.image_url, images))
            file.write(json.dumps({"content": content}) + "\n")


Runs = dict[str, list[list[Row]]]  # by arm, the rows of each repeat


class MetricsSampler:
    """Reads the ``/metrics`` of a server at intervals, in a thread."""

    def __init__(self, running: server.Server, interval: float) -> None:
        self.samples: list[dict[str, float]] = []
        self._server = running
        self._interval = interval
        self._start = time.perf_counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MetricsSampler":
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError, http.client.HTTPException):  # the client reports failures
            self._take()

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            with contextlib.suppress(OSError, http.client.HTTPException):  # a missed sample
                self._take()

    def _take(self) -> None:
        page = self._server.get("/metrics")
        values = {name: server.metric_of(page, metric) for name, metric in SAMPLED.items()}
        self.samples.append({"seconds": time.perf_counter() - self._start, **values})


def summarise_samples(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Totals and maxima of a run, and medians of its saturated phase.

    The saturated phase lasts from the first to the last sample with waiting requests. Before it
    the server fills up; after it the batch only shrinks.
    """
    first, last = samples[0], samples[-1]
    waiting = [sample for sample in samples if sample["waiting"] > 0]
    found: dict[str, Any] = {name: int(last[name] - first[name]) for name in TOTALS}
    found["most_running"] = int(max(sample["running"] for sample in samples))
    found["most_kv_usage"] = round(max(sample["kv_usage"] for sample in samples), 3)
    if len(waiting) > 1:
        seconds = waiting[-1]["seconds"] - waiting[0]["seconds"]
        tokens = waiting[-1]["generated_tokens"] - waiting[0]["generated_tokens"]
        found["saturated"] = {
            "seconds": round(seconds, 1),
            "running": statistics.median(sample["running"] for sample in waiting),
            "output_throughput": round(tokens / seconds, 2),
        }
    return found


def series(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """At most `MAX_SERIES_POINTS` samples, by name, for the plots over time."""
    kept = samples[:: math.ceil(len(samples) / MAX_SERIES_POINTS)]
    names = ("seconds", "running", "waiting", "kv_usage")
    return {name: [round(sample[name], 3) for sample in kept] for name in names}


def client_command(
    running: server.Server,
    model: str,
    point: Point,
    workload: Path,
    result: Path,
    ending: list[str],
) -> list[str]:
    """``vllm bench serve`` for a point; ``how``: `ends`."""
    return [
        *server.program(),
        *("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", running.url, "--model", model, "--trust-remote-code"),
        *("--dataset-name", "custom_image", "--dataset-path", str(workload), "--disable-shuffle"),
        *("--output-len", str(point.output_len)),
        *("--num-prompts", str(point.num_prompts), "--request-rate", str(point.request_rate)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
        *("--disable-tqdm", "--save-result"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
        *ending,
    ]


def ends(model: str, point: Point, has_weights: bool) -> list[str]:
    """Client arguments that decide how the outputs of a point end."""
    if not point.ends_early:
        return ["--ignore-eos", "--temperature", "0"]
    if has_weights:
        return []
    bias = shape.ending_bias(Path(model), MEAN_OUTPUT_FRACTION * point.output_len)
    return ["--temperature", "1", "--extra-body", json.dumps({"logit_bias": bias})]


def run_point(
    running: server.Server, model: str, point: Point, options: argparse.Namespace, first: int
) -> Row:
    """Send the requests of a point.

    Args:
        running: the server.
        model: its model.
        point: the workload and load.
        options: of the command line.
        first: seed of the first image.

    Returns:
        A row with what the client and the server's metrics report.

    Raises:
        RuntimeError: if a request failed; includes the end of the client's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        workload, result = Path(folder) / "workload.jsonl", Path(folder) / "result.json"
        write_workload(workload, point, options.image_size, first)
        ending = ends(model, point, has_weights=options.model is not None)
        command = client_command(running, model, point, workload, result, ending)
        with MetricsSampler(running, options.interval) as sampler:
            client = subprocess.run(
                command, env=server.environment(), capture_output=True, text=True
            )
        if client.returncode or not result.exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{client.stderr[-4000:]}")
        found = json.loads(result.read_text())
    if found["failed"] or found["completed"] != point.num_prompts:
        raise RuntimeError(f"{found['failed']} requests failed:\n{client.stdout[-4000:]}")
    latencies = {
        f"{name}_{percentile}_ms": round(found[f"{percentile}_{name}_ms"], 1)
        for name, percentile in itertools.product(("ttft", "tpot", "itl", "e2el"), ("p50", "p99"))
    }
    # Little's law: mean number of requests = arrivals per second x mean seconds. Here for the
    # requests between their first and their last token.
    decoding_seconds = (found["mean_e2el_ms"] - found["mean_ttft_ms"]) / 1000
    return {
        **point.as_json(),
        "prompt_tokens": round(found["total_input_tokens"] / found["completed"]),
        "seconds": round(found["duration"], 1),
        "output_throughput": round(found["output_throughput"], 2),
        "request_throughput": round(found["request_throughput"], 4),
        "mean_answering": round(found["completed"] / found["duration"] * decoding_seconds, 2),
        **latencies,
        **summarise_samples(sampler.samples),
        "series": series(sampler.samples),
    }


def run_arm(
    model: str, arm: str, arguments: list[str], options: argparse.Namespace
) -> Iterator[Row]:
    """Start a server, send the requests of every point, and yield one row for each."""
    log = options.log_dir / f"{arm}.log"
    print(f"{arm}: {' '.join(server.command(Path(model), *arguments))}", flush=True)
    with server.running(
        Path(model), log, *arguments, start_timeout=options.start_timeout
    ) as running:
        warm_up = Point(max(options.images), 8, math.inf, 2)
        run_point(running, model, warm_up, options, 0)
        first = 2 * warm_up.images
        for point in points(options):
            row = run_point(running, model, point, options, first)
            first += point.images * point.num_prompts
            print(f"{arm}: {point}: {summary(row)}", flush=True)
            yield {**row, "num_blocks": running.num_blocks()}


def measure(model: str, options: argparse.Namespace, runs: Runs) -> None:
    """Add the rows of both servers and all repeats to ``runs``, in the order of the points."""
    eviction = [f"--kv-compress={options.policy}", f"--kv-compress-budget={options.budget}"]
    if options.config:
        eviction.append(f"--kv-compress-config={options.config}")
    both = [f'--limit-mm-per-prompt={{"image": {max(options.images)}}}', *options.server_arguments]
    arguments = {"stock": both, "ours": [*both, *eviction]}
    for repeat in range(options.repeats):
        for arm in reversed(ARMS) if repeat % 2 else ARMS:
            runs[arm].append([])
            for row in run_arm(model, arm, arguments[arm], options):
                runs[arm][-1].append(row)


def merged(values: Sequence[Any]) -> Any:
    """The median of a value in several runs; of dictionaries, for each entry that all contain."""
    if isinstance(values[0], dict):
        names = [name for name in values[0] if all(name in value for value in values)]
        return {
            # A time series has no median; the first one is used.
            name: values[0][name] if name == "series" else merged([v[name] for v in values])
            for name in names
        }
    return values[0] if isinstance(values[0], str) else statistics.median(values)


def keep_plotted_series(results: dict[str, list[Row]]) -> None:
    """Remove the time series from all rows but the one of each arm that is plotted over time."""
    for rows in results.values():
        plotted = report.sweep(rows)[-1]
        for row in rows:
            if row is not plotted:
                row.pop("series", None)


def summary(row: Row) -> str:
    """A printed line of one row."""
    saturated = row.get("saturated", {})
    return (
        f"{row['output_throughput']:.1f} tokens/s, TTFT {row['ttft_p50_ms']:.0f} ms, "
        f"ITL {row['itl_p50_ms']:.1f} ms, running {saturated.get('running', row['most_running'])}, "
        f"preemptions {row['preemptions']}, evicted {row['evicted_requests']}, "
        f"{row['seconds']:.0f} s"
    )


@contextlib.contextmanager
def profile_model(options: argparse.Namespace) -> Iterator[str]:
    """The model to serve: the given one, or a generated one with dummy weights."""
    if options.model:
        yield options.model
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(shape.build(Path(folder) / f"llava-{options.shape}", options.shape))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, json=False)
    add = parser.add_argument
    add("--profile", choices=sorted(PROFILES), help="a set of defaults")
    add("--model", help="default: a LLaVA with dummy weights")
    add(
        "--shape",
        choices=shape.TEXT_CONFIGS,
        default="0.5b",
        help="shape of the profile's language model",
    )
    add("--policy", default="vlcache")
    add("--budget", type=float, default=0.1)
    add("--config", metavar="JSON", help="--kv-compress-config")
    add("--images", type=int, nargs="+", default=[1], help="per prompt; the first is swept")
    add("--image-size", type=int, default=448, help="pixels a side")
    add(
        "--output-len",
        type=int,
        nargs="+",
        default=[128, 512],
        help="output tokens; the last is swept",
    )
    add("--request-rate", type=float, nargs="+", default=[math.inf], help="requests per second")
    add("--num-prompts", type=int, default=100, help="maximum for each point")
    add("--other-prompts", type=int, help="for points outside the sweep; default: --num-prompts")
    add("--seconds", type=float, help="duration of finite rates, with at most --num-prompts")
    add(
        "--end-early",
        action="store_true",
        help="the model ends outputs; --output-len is the maximum",
    )
    add("--repeats", type=int, default=1, help="of everything; alternates the order of the servers")
    add("--start-timeout", type=float, default=1800.0, help="seconds for a server to start")
    add("--interval", type=float, default=0.5, help="seconds between two samples of /metrics")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="results; an interrupted run writes FILE.partial.json",
    )
    add("--plot", type=Path, metavar="FILE", help="default: the --json file with suffix .png")
    add("--log-dir", type=Path, metavar="FOLDER", help="keep the logs of the servers here")
    add("server_arguments", nargs="*", metavar="-- SERVER ARGUMENTS", help="for both servers")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with defaults from the profile.

    Server arguments of the command line are appended to those of the profile.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments).profile
    if chosen:
        parser.set_defaults(**PROFILES[chosen])
    options = parser.parse_args(arguments)
    if chosen:
        extra = options.server_arguments
        own = PROFILES[chosen]["server_arguments"]
        options.server_arguments = own if extra == own else [*own, *extra]
    if bool(chosen) == bool(options.model):
        parser.error(
            "exactly one of --profile and --model is required (profiles use dummy weights)"
        )
    if min(options.request_rate) <= 0 or min(options.images) < 1 or min(options.output_len) < 2:
        parser.error("--request-rate must be above 0, --images at least 1, --output-len at least 2")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def write(
    path: Path, arguments: Sequence[str] | None, options: argparse.Namespace, **contents: Any
) -> None:
    """Write a report with the settings."""
    names = ("profile", "policy", "budget", "config", "image_size", "repeats", "server_arguments")
    settings = {name: getattr(options, name) for name in names}
    model = options.model or f"LLaVA, language model of shape {options.shape}, dummy weights"
    write_report(path, "benchmarks.serving", arguments, model=model, **settings, **contents)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.model:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    if options.profile:  # by default vLLM reserves one core for the API server
        last = len(os.sched_getaffinity(0)) - 1
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{last}")
    start = time.perf_counter()
    runs: Runs = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder, profile_model(options) as model:
        options.log_dir = options.log_dir or Path(folder)
        options.log_dir.mkdir(parents=True, exist_ok=True)
        try:
            measure(model, options, runs)
        except BaseException:
            if options.json:
                write(options.json.with_suffix(".partial.json"), arguments, options, runs=runs)
            raise
    minutes = round((time.perf_counter() - start) / 60, 1)
    print(f"{minutes} minutes")
    results = {
        arm: [merged(rows) for rows in zip(*repeats, strict=True)] for arm, repeats in runs.items()
    }
    keep_plotted_series(results)
    if options.json:
        write(options.json, arguments, options, minutes=minutes, results=results)
    if options.json or options.plot:
        from benchmarks.serving import plots

        plots.draw(results, options.plot or options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
