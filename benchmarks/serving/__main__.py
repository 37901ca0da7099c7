# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against eviction through the real server: same machine, pool, workload and client.

    python -m benchmarks.serving --profile cpu [--json FILE] [--plot FILE]
    python -m benchmarks.serving --model MODEL --image-size 336 --images 1 2 --output-len 128 512 \\
        --request-rate 1 2 4 inf --num-prompts 200 -- --gpu-memory-utilization 0.9

Starts ``vllm serve`` twice, without and with ``--kv-compress``, and sends both the same requests
with vLLM's own client (``vllm bench serve``). The first number of images with the last output
length is offered at every rate; with another output length, or another number of images, at the
highest rate. ``--repeats`` does all of it again, the other server first; medians are reported.
What follows ``--`` goes to both servers.

Answers have exactly their output length, as is usual for vLLM's benchmarks, if not ``--end-early``:
then the model ends them, and the scheduler cannot know when.

A profile is a set of defaults: ``cpu`` takes 10 to 20 minutes on two cores, ``cpu-ample``, with a
pool that limits neither, and ``cpu-early``, with answers that end early, 7 each; twice as long on
cores that others use, too.
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
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import shape
from testing import server, tiny_models
from testing.results import write_report

# Name in the results: name in /metrics.
WATCHED = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "evicted_requests": "vllm:kv_compress_evicted_requests_total",
}
TOTALS = ("preemptions", "generated_tokens", "evicted_requests")
ARMS = ("stock", "ours")
# Of their output length, where answers end early in a model without weights.
MEAN_SHARE = 0.25

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
        "--gpu-memory-utilization=0.5",  # of the memory that the machine must have free
        "--num-gpu-blocks-override=192",  # two prompts of two images and their answers
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
    # Three images: the paper's prompts of 2.9K tokens.
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
                f"--kv-cache-memory-bytes={gib << 30}",  # a dozen of these prompts
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
    """Requests per second, Poisson; ``inf``: all at once."""
    num_prompts: int
    ends_early: bool = False

    def __str__(self) -> str:
        most = "at most " if self.ends_early else ""
        return (
            f"{self.images} images, {most}{self.output_len} output tokens, "
            f"{self.request_rate} requests/s"
        )

    def as_json(self) -> dict[str, Any]:
        """The load as text: JSON has no infinity."""
        return {**vars(self), "request_rate": str(self.request_rate)}


def points(options: argparse.Namespace) -> list[Point]:
    """The load sweep of one workload, then others at the highest load, one thing changed."""
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
    most = options.other_prompts or options.num_prompts
    return found + [Point(*other, highest, most, options.end_early) for other in others]


def write_workload(path: Path, point: Point, image_size: int, first: int) -> None:
    """The requests of a point, for the client: all images different, the question last."""
    with path.open("w") as file:
        for number in range(point.num_prompts):
            seeds = range(first + number * point.images, first + (number + 1) * point.images)
            images = (tiny_models.random_image(seed, (image_size, image_size)) for seed in seeds)
            content = server.chat_content(shape.QUESTION, *map(server.image_url, images))
            file.write(json.dumps({"content": content}) + "\n")


Runs = dict[str, list[list[dict[str, Any]]]]  # of each arm, of each repeat, its rows


class Watcher:
    """Reads a server's ``/metrics`` at intervals, in a thread."""

    def __init__(self, running: server.Server, interval: float) -> None:
        self.samples: list[dict[str, float]] = []
        self._server = running
        self._interval = interval
        self._start = time.perf_counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError, http.client.HTTPException):  # the client says more
            self._take()

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            with contextlib.suppress(OSError, http.client.HTTPException):  # a late answer
                self._take()

    def _take(self) -> None:
        page = self._server.get("/metrics")
        values = {name: server.metric_of(page, metric) for name, metric in WATCHED.items()}
        self.samples.append({"seconds": time.perf_counter() - self._start, **values})


def watched(samples: list[dict[str, float]]) -> dict[str, Any]:
    """What the samples of a run say.

    "Saturated" is the time from the first sample in which requests wait to the last one: before it
    the server fills, after it the batch only shrinks.
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


def series(samples: list[dict[str, float]], most: int = 240) -> dict[str, list[float]]:
    """Samples by name, thinned out, for the plots over time."""
    kept = samples[:: math.ceil(len(samples) / most)]
    names = ("seconds", "running", "waiting", "kv_usage")
    return {name: [round(sample[name], 3) for sample in kept] for name in names}


def client_command(
    running: server.Server, model: str, point: Point, workload: Path, result: Path, how: list[str]
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
        *how,
    ]


def ends(model: str, point: Point, has_weights: bool) -> list[str]:
    """Arguments of `client_command` that decide how a point's answers end."""
    if not point.ends_early:
        return ["--ignore-eos", "--temperature", "0"]
    if has_weights:
        return []
    bias = shape.ending_bias(Path(model), MEAN_SHARE * point.output_len)
    return ["--temperature", "1", "--extra-body", json.dumps({"logit_bias": bias})]


def run_point(
    running: server.Server, model: str, point: Point, options: argparse.Namespace, first: int
) -> dict[str, Any]:
    """Send a point's requests, with images from the ``first`` on; what client and metrics say.

    Raises:
        RuntimeError: if a request failed, with the end of the client's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        workload, result = Path(folder) / "workload.jsonl", Path(folder) / "result.json"
        write_workload(workload, point, options.image_size, first)
        how = ends(model, point, has_weights=options.model is not None)
        command = client_command(running, model, point, workload, result, how)
        with Watcher(running, options.interval) as watcher:
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
    # Little's law: mean number in a stage is arrivals per second times mean seconds in it.
    answering = (found["mean_e2el_ms"] - found["mean_ttft_ms"]) / 1000
    return {
        **point.as_json(),
        "prompt_tokens": round(found["total_input_tokens"] / found["completed"]),
        "seconds": round(found["duration"], 1),
        "output_throughput": round(found["output_throughput"], 2),
        "request_throughput": round(found["request_throughput"], 4),
        "mean_answering": round(found["completed"] / found["duration"] * answering, 2),
        **latencies,
        **watched(watcher.samples),
        "series": series(watcher.samples),
    }


def run_arm(
    model: str, arm: str, arguments: list[str], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Start a server and send it every point's requests; a row of each."""
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
    """Add the rows of both servers, of every repeat, in the order of the points."""
    ours = [f"--kv-compress={options.policy}", f"--kv-compress-budget={options.budget}"]
    if options.config:
        ours.append(f"--kv-compress-config={options.config}")
    both = [f'--limit-mm-per-prompt={{"image": {max(options.images)}}}', *options.server_arguments]
    arguments = {"stock": both, "ours": [*both, *ours]}
    for repeat in range(options.repeats):
        for arm in reversed(ARMS) if repeat % 2 else ARMS:
            runs[arm].append([])
            for row in run_arm(model, arm, arguments[arm], options):
                runs[arm][-1].append(row)


def merged(values: Sequence[Any]) -> Any:
    """Of several runs' values the median, in dictionaries of each entry that all have."""
    if isinstance(values[0], dict):
        names = [name for name in values[0] if all(name in value for value in values)]
        return {
            # Runs over time have no median; the first one stands for them.
            name: values[0][name] if name == "series" else merged([v[name] for v in values])
            for name in names
        }
    return values[0] if isinstance(values[0], str) else statistics.median(values)


def summary(row: dict[str, Any]) -> str:
    saturated = row.get("saturated", {})
    return (
        f"{row['output_throughput']:.1f} tokens/s, TTFT {row['ttft_p50_ms']:.0f} ms, "
        f"ITL {row['itl_p50_ms']:.1f} ms, running {saturated.get('running', row['most_running'])}, "
        f"preemptions {row['preemptions']}, evicted {row['evicted_requests']}, "
        f"{row['seconds']:.0f} s"
    )


@contextlib.contextmanager
def profile_model(options: argparse.Namespace) -> Iterator[str]:
    """The model to serve: the given one, or one without weights."""
    if options.model:
        yield options.model
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(shape.build(Path(folder) / f"llava-{options.shape}", options.shape))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", choices=sorted(PROFILES), help="defaults for a class of machines")
    add("--model", help="default: a LLaVA of the 0.5B class with --load-format dummy")
    add("--shape", choices=shape.SHAPES, default="0.5b", help="of the profile's model")
    add("--policy", default="vlcache")
    add("--budget", type=float, default=0.1)
    add("--config", metavar="JSON", help="--kv-compress-config")
    add("--images", type=int, nargs="+", default=[1], help="of a prompt; the first one is swept")
    add("--image-size", type=int, default=448, help="pixels a side")
    add("--output-len", type=int, nargs="+", default=[128, 512], help="the last one is swept")
    add("--request-rate", type=float, nargs="+", default=[math.inf], help="requests per second")
    add("--num-prompts", type=int, default=100, help="of each point, at most")
    add("--other-prompts", type=int, help="of the points that are not swept; default: as many")
    add("--seconds", type=float, help="of requests at a finite rate (fewer than --num-prompts)")
    add("--end-early", action="store_true", help="the model ends answers; --output-len is the most")
    add("--repeats", type=int, default=1, help="of all, with the order of the servers changed")
    add("--start-timeout", type=float, default=1800.0, help="seconds until a server must answer")
    add("--interval", type=float, default=0.5, help="seconds between two reads of /metrics")
    add(
        "--json", type=Path, metavar="FILE", help="results; of a run cut short in FILE.partial.json"
    )
    add("--plot", type=Path, metavar="FILE", help="default: beside --json, as .png")
    add("--log-dir", type=Path, metavar="FOLDER", help="keep the servers' logs here")
    add("server_arguments", nargs="*", metavar="-- SERVER ARGUMENTS", help="of both servers")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; those of the profile where the command line is silent."""
    parser = _parser()
    chosen = parser.parse_args(arguments).profile
    if chosen:
        parser.set_defaults(**PROFILES[chosen])
    options = parser.parse_args(arguments)
    if chosen:  # in addition to, and stronger than, the profile's own
        extra = options.server_arguments
        own = PROFILES[chosen]["server_arguments"]
        options.server_arguments = own if extra == own else [*own, *extra]
    if bool(chosen) == bool(options.model):
        parser.error(
            "one of --profile (which brings a model without weights) and --model is needed"
        )
    if min(options.request_rate) <= 0 or min(options.images) < 1 or min(options.output_len) < 2:
        parser.error("--request-rate must be above 0, --images at least 1, --output-len at least 2")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def write(
    path: Path, arguments: Sequence[str], options: argparse.Namespace, **contents: Any
) -> None:
    """A report with the settings."""
    names = ("profile", "policy", "budget", "config", "image_size", "repeats", "server_arguments")
    settings = {name: getattr(options, name) for name in names}
    model = options.model or f"LLaVA, language model of shape {options.shape}, dummy weights"
    write_report(path, "benchmarks.serving", arguments, model=model, **settings, **contents)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if options.model:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    if options.profile:  # vLLM's default leaves one of two cores to the API server
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
    if options.json:
        write(options.json, arguments, options, minutes=minutes, results=results)
    if options.json or options.plot:
        from benchmarks.serving import plots

        plots.draw(results, options.plot or options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
