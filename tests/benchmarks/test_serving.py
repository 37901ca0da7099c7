# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark: points, evaluation of the metrics, results, and one small run."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import report, shape
from benchmarks.serving import __main__ as serving
from benchmarks.serving import plots
from benchmarks.serving.__main__ import Point
from testing import tiny_models


def test_one_workload_is_swept_and_the_others_run_at_the_highest_load() -> None:
    rates = ["--request-rate", "0.5", "inf", "0.1", "--num-prompts", "30", "--seconds", "100"]
    options = serving.parse(
        ["--model=m", "--images", "2", "1", "--output-len", "4", "16", "512", *rates]
    )
    assert serving.points(options) == [
        Point(2, 512, 0.1, 10),  # limited by --seconds
        Point(2, 512, 0.5, 30),  # limited by --num-prompts
        Point(2, 512, math.inf, 30),
        Point(2, 16, math.inf, 30),
        Point(2, 4, math.inf, 30),
        Point(1, 512, math.inf, 30),
    ]


def test_the_command_line_overrides_the_profile() -> None:
    profile = serving.parse(["--profile", "cpu"])
    assert profile.images == serving.PROFILES["cpu"]["images"]
    changed = serving.parse(
        ["--profile", "cpu", "--images", "3", "--", "--num-gpu-blocks-override=9"]
    )
    assert changed.images == [3]
    assert changed.output_len == profile.output_len
    assert changed.server_arguments == [*profile.server_arguments, "--num-gpu-blocks-override=9"]


def test_a_profile_or_a_model_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parse([])
    assert "--profile" in capsys.readouterr().err


def test_images_of_a_workload_differ(tmp_path: Path) -> None:
    serving.write_workload(tmp_path / "a", Point(2, 16, 1.0, 3), 28, first=0)
    serving.write_workload(tmp_path / "b", Point(1, 16, 1.0, 1), 28, first=6)
    lines = [*(tmp_path / "a").read_text().splitlines(), *(tmp_path / "b").read_text().splitlines()]
    contents = [json.loads(line)["content"] for line in lines]
    urls = [part["image_url"]["url"] for content in contents for part in content[:-1]]
    assert len(urls) == len(set(urls)) == 7
    assert {content[-1]["type"] for content in contents} == {"text"}


def sample(seconds: float, running: int, waiting: int, tokens: int) -> dict[str, float]:
    zeros = dict.fromkeys(serving.SAMPLED, 0.0)
    return zeros | {
        "seconds": seconds,
        "running": running,
        "waiting": waiting,
        "generated_tokens": 1000 + tokens,
    }


def test_the_saturated_phase_has_waiting_requests() -> None:
    found = serving.summarise_samples(
        [
            sample(0, 0, 0, 0),
            sample(1, 2, 3, 10),
            sample(2, 4, 1, 50),
            sample(3, 3, 2, 110),
            sample(4, 9, 0, 200),
            sample(5, 0, 0, 300),
        ]
    )
    assert found["saturated"] == {"seconds": 2.0, "running": 3, "output_throughput": 50.0}
    assert found["most_running"] == 9
    assert found["generated_tokens"] == 300
    assert "saturated" not in serving.summarise_samples([sample(0, 0, 0, 0), sample(1, 1, 0, 9)])


def test_repeats_are_merged() -> None:
    one = {
        "request_rate": "inf",
        "itl_p50_ms": 3.0,
        "saturated": {"running": 2},
        "series": {"a": 1},
    }
    two = {
        "request_rate": "inf",
        "itl_p50_ms": 5.0,
        "saturated": {"running": 8},
        "series": {"a": 2},
    }
    assert serving.merged([one, two]) == {
        "request_rate": "inf",
        "itl_p50_ms": 4.0,
        "saturated": {"running": 5},
        "series": {"a": 1},
    }
    del two["saturated"]  # no request waited
    assert "saturated" not in serving.merged([one, two])


def test_time_series_are_short_and_plotted_from_the_committed_results(tmp_path: Path) -> None:
    for name in ("serving", "serving-ample", "serving-early"):
        results = report.load(name)["results"]
        for rows in results.values():
            plotted = report.sweep(rows)[-1]
            assert [row for row in rows if "series" in row] == [plotted]
            lengths = {len(values) for values in plotted["series"].values()}
            assert max(lengths) <= serving.MAX_SERIES_POINTS
        plots.draw(results, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    samples = [sample(i, 1, 0, i) for i in range(1000)]
    assert len(serving.series(samples)["seconds"]) <= serving.MAX_SERIES_POINTS


def test_the_order_of_the_servers_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run_arm(model: str, arm: str, *_: object) -> list[dict[str, str]]:
        started.append(arm)
        return [{"of": arm}]

    monkeypatch.setattr(serving, "run_arm", run_arm)
    runs: serving.Runs = {arm: [] for arm in serving.ARMS}
    serving.measure("m", serving.parse(["--model=m", "--repeats=3"]), runs)
    assert started == ["stock", "ours", "ours", "stock", "stock", "ours"]
    assert runs == {arm: [[{"of": arm}]] * 3 for arm in serving.ARMS}


def test_outputs_end_early_if_requested(tmp_path: Path) -> None:
    model = str(shape.build(tmp_path))
    [exact] = serving.points(serving.parse(["--model=m", "--output-len", "512"]))
    [early] = serving.points(serving.parse(["--model=m", "--output-len", "512", "--end-early"]))
    assert "--ignore-eos" in serving.ends(model, exact, has_weights=False)
    assert serving.ends(model, early, has_weights=True) == []
    body = json.loads(serving.ends(model, early, has_weights=False)[-1])
    [(token, bias)] = body["logit_bias"].items()
    vocabulary = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    logits = torch.zeros(vocabulary, dtype=torch.float64)
    logits[int(token)] += bias
    assert logits.softmax(0)[int(token)].item() == pytest.approx(1 / 128)


@pytest.mark.server
def test_a_run(tmp_path: Path) -> None:
    """Both servers, the client, the report and the figure."""
    model = tiny_models.build("llava", tmp_path / "model", image_size=112)
    result = tmp_path / "serving.json"
    serving.main(
        (
            f"--model={model} --json={result} --log-dir={tmp_path} --image-size=112 --images 2 "
            "--output-len 40 --request-rate inf --num-prompts 8 --interval=0.05 --budget=0.25 "
            "-- --enforce-eager --dtype=float32 --block-size=32 --num-gpu-blocks-override=24 "
            "--max-model-len=480 --gpu-memory-utilization=0.5"
        ).split()
    )
    report = json.loads(result.read_text())
    stock, ours = report["results"]["stock"], report["results"]["ours"]
    assert [row["output_len"] for row in ours] == [40]
    for row, other in zip(stock, ours, strict=True):
        assert row["prompt_tokens"] == other["prompt_tokens"] > 128
        assert row["generated_tokens"] == other["generated_tokens"] == 8 * row["output_len"]
        assert row["evicted_requests"] == 0
        assert other["evicted_requests"] >= 8
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"]
    assert ours[0]["most_running"] > stock[0]["most_running"]
    assert result.with_suffix(".png").stat().st_size > 10_000
