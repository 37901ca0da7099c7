# SPDX-License-Identifier: Apache-2.0
"""Architectures and cache types: each serves image requests with eviction."""

from pathlib import Path
from typing import Any

import pytest
import torch

from testing import engine as harness
from testing import tiny_models
from testing.engine import read_trace

LONG = "Describe everything that you can see in the picture, from left to right. " * 4


def serve(model: Path, kind: str, trace: Path, **kwargs: Any) -> list[dict[str, Any]]:
    """Two image requests and a text-only one; returns the evictions."""
    settings = {"policy": "vlcache", "budget": 0.25, "trace": {"path": str(trace)}}
    requests = [
        harness.image_request(kind, LONG, [1]),
        {"prompt": "Hello " * 100},
        harness.image_request(kind, LONG, [2, 3], size=(300, 500)),
    ]
    with harness.engine(model, settings, **kwargs) as llm:
        outputs = llm.generate(requests, harness.greedy(40), use_tqdm=False)
        assert harness.eviction_stats(llm).evicted == 2
    for output in outputs:
        assert len(harness.token_ids(output)) == 40
        assert all(torch.isfinite(torch.tensor(harness.logprobs(output))))
    records = list(read_trace(trace).values())
    assert len(records) == 2
    for record in records:
        total = sum(record["kept_tokens"])
        assert total == record["kept_blocks"] * record["block_size"] * len(record["kept_tokens"])
    return records


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_architecture(models_dir: Path, tmp_path: Path, kind: str) -> None:
    model = tiny_models.build(kind, models_dir / kind)
    records = serve(model, kind, tmp_path / "trace")
    assert any(len(set(record["kept_tokens"])) > 1 for record in records)
    for record in records:
        grids = record["grids"]
        if kind == "llava-next":  # several resolutions: not known
            assert grids == []
        else:  # every visual token lies on one
            assert [[first, first + rows * stride] for first, rows, _, stride in grids] == [
                [*image] for image in record["visual"]
            ]
            assert all(columns == stride for *_, columns, stride in grids)
            sides = {rows > columns for _, rows, columns, _ in grids}
            assert "llava" in kind or sides == {len(grids) > 1}  # the second request's are upright


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(models_dir: Path, tmp_path: Path, dtype: str) -> None:
    model = tiny_models.build("llava", models_dir / "llava")
    low = serve(model, "llava", tmp_path / dtype, dtype=dtype)
    full = serve(model, "llava", tmp_path / "float32")
    for a, b in zip(low, full, strict=True):
        assert a["density"] == pytest.approx(b["density"], abs=0.05)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM needs AVX-512 for it")
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
def test_fp8_cache(models_dir: Path, tmp_path: Path, kv_cache_dtype: str) -> None:
    model = tiny_models.build("llava", models_dir / "llava")
    low = serve(model, "llava", tmp_path / "fp8", dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    full = serve(model, "llava", tmp_path / "float32")
    for a, b in zip(low, full, strict=True):
        assert a["density"] == pytest.approx(b["density"], abs=0.08)


@pytest.mark.parametrize("head_size", [80, 128])
def test_head_size(models_dir: Path, tmp_path: Path, head_size: int) -> None:
    """80 is packed for 16-wide vectors."""
    model = tiny_models.build("llava", models_dir / f"llava-{head_size}", head_size=head_size)
    serve(model, "llava", tmp_path / "trace")


def test_compiled(models_dir: Path, tmp_path: Path) -> None:
    """With vLLM's default compilation, as `vllm serve` runs."""
    model = tiny_models.build("llava", models_dir / "llava")
    eager = serve(model, "llava", tmp_path / "eager")
    compiled = serve(model, "llava", tmp_path / "compiled", enforce_eager=False)
    for a, b in zip(compiled, eager, strict=True):
        assert a["kept_tokens"] == b["kept_tokens"]
