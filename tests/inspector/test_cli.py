# SPDX-License-Identifier: Apache-2.0
"""The command: refused arguments, and complete runs through vLLM."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.accuracy import MODEL
from evaluation.cases import page_reader_cases
from testing import tiny_models
from tests.helpers.made_up import page_data, token_at
from training.render import CELL
from vl_cache_vllm.inspector.cli import _open, main

FLAGS = (
    "--enforce-eager",
    "--max-model-len=2048",
    "--block-size=32",
    "--kv-cache-memory-bytes=64M",
    "--dtype=float32",
)


def run(folder: Path, model: Path, images: list[Image.Image], *flags: str) -> Path:
    """Run the command on these images and return the prefix of its output files."""
    paths = [folder / f"image{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    prefix = folder / "out" / "shown"
    main(
        [
            f"--model={model}",
            *(part for path in paths for part in ("--image", str(path))),
            f"--output={prefix}",
            *FLAGS,
            *flags,
        ]
    )
    with Image.open(prefix.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 10
    return prefix


@pytest.mark.slow
def test_a_look_up_shows_the_record_among_the_kept_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(c for c in page_reader_cases("test", ["lookup"], 4) if len(c.load_images()) == 2)
    prefix = run(
        tmp_path,
        MODEL,
        case.load_images(),
        f"--prompt={case.question}",
        "--kv-compress=vlcache-plus",
        '--kv-compress-config={"evict_after": 0}',
        "--kv-compress-budget=0.1",
    )
    answer = case.answers[0]
    assert f"with full cache  {answer}" in capsys.readouterr().out
    html = prefix.with_suffix(".html").read_text(encoding="utf-8")
    assert html.count(f"<blockquote>{answer}</blockquote>") == 2
    data = page_data(prefix.with_suffix(".html"))
    assert len(data["panels"]) == 2
    share = data["kept"].mean(axis=(0, 1))
    visual = [t for first, end in data["visual"] for t in range(first, end)]
    assert share[visual].mean() < 0.15
    # The visual tokens of the answer, found by their position on the page.
    printed = []
    for image, cell in case.answer_cells:
        row, column = divmod(cell, 20)
        x, y = (column + 0.5) * CELL, (row + 0.5) * CELL
        printed.append(token_at(data["panels"][image], x, y))
    assert printed == [data["visual"][image][0] + cell for image, cell in case.answer_cells]
    assert share[printed].min() >= 0.5
    assert share[printed].mean() >= 0.9
    # Every head keeps the number of tokens that the bar chart shows for its layer.
    for layer, heads in enumerate(data["kept"]):
        assert heads.sum(axis=1).tolist() == [data["keptTokens"][layer]] * data["heads"]
    assert "".join(data["texts"]).count(case.question) == 1


@pytest.mark.slow
def test_rectangular_grids_of_several_images_and_several_evictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.build("qwen2-vl", tmp_path / "model")
    sizes = [(448, 336), (300, 500)]
    images = [tiny_models.random_image(i, size) for i, size in enumerate(sizes)]
    prefix = run(
        tmp_path,
        model,
        images,
        "--prompt=What is it?",
        "--max-tokens=70",
        "--kv-compress-budget=.3",
        "--kv-compress-every=32",
    )
    page = prefix.with_suffix(".html").read_text(encoding="utf-8")
    assert 'data-eviction="3"' in page and 'data-eviction="5"' not in page
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:1] == ["2"] for line in printed) == 1
    data = page_data(prefix.with_suffix(".html"))
    for panel, size, (first, end) in zip(data["panels"], sizes, data["visual"], strict=True):
        assert panel["kind"] == "overlay"
        assert panel["size"] == list(size)
        ((_, rows, columns, _),) = [cells["grid"] for cells in panel["cells"]]
        assert rows * columns == end - first
        assert (rows < columns) == (size[1] < size[0])
    assert "vlcache" in page


@pytest.mark.slow
def test_tokens_of_unknown_layout_are_a_strip_and_refusals_say_why(tmp_path: Path) -> None:
    model = tiny_models.build("llava-next", tmp_path / "model")
    images = [tiny_models.random_image(0)]
    question = "--prompt=What do you see? Say it all, and in detail, please."
    prefix = run(tmp_path, model, images, question, "--max-tokens=6", "--kv-compress-budget=0.3")
    data = page_data(prefix.with_suffix(".html"))
    (panel,) = data["panels"]
    ((first, end),) = data["visual"]
    assert panel["kind"] == "strip"
    assert sum(cells["grid"][2] for cells in panel["cells"]) == end - first
    with pytest.raises(SystemExit, match="no block would be freed"):
        run(tmp_path, model, images, question, "--max-tokens=6", "--kv-compress-budget=0.95")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    return f"--image={path}"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code != 0
    return f"{caught.value.code}{capsys.readouterr().err}"


MODEL_FLAG = f"--model={MODEL}"


def test_bad_arguments_are_refused_before_anything_is_loaded(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    assert "--model" in refusal(capsys, picture, "--prompt=a")
    assert "--prompt" in refusal(capsys, MODEL_FLAG, picture)
    assert "no such image: absent.png" in refusal(
        capsys, MODEL_FLAG, "--image=absent.png", "--prompt=a"
    )
    assert "text.png as an image" in refusal(
        capsys, MODEL_FLAG, f"--image={tmp_path / 'text.png'}", "--prompt=a"
    )
    assert "--max-tokens must be" in refusal(
        capsys, MODEL_FLAG, picture, "--prompt=a", "--max-tokens=0"
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--kv-compress=none"], "disables compression: choose a policy"),
        (['--kv-compress-config={"poling": 3}'], "'poling'"),
        (['--kv-compress-config={"trace": {"path": "trace"}}'], "remove trace"),
        (['--kv-compress-config={"trace": {"path": "trace"}}'], "remove trace"),
        (["--kv-cache-dtype=fp8_inc"], "KV cache type fp8_inc: use --kv-cache-dtype auto"),
    ],
)
def test_refusals_are_one_message(
    flags: list[str], expected: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, MODEL_FLAG, picture, "--prompt=a", *FLAGS, *flags)
    assert message.startswith("vl-cache-inspect: error: ")
    assert expected in message
    assert "Traceback" not in message


def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def without_matplotlib(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    message = refusal(capsys, MODEL_FLAG, "--prompt=a")
    assert "matplotlib missing: pip install 'vl-cache-vllm[inspect]'" in message


def test_pictures_are_upright_and_on_white(tmp_path: Path) -> None:
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(clear)
    assert _open(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation tag: rotate by 90 degrees
    Image.new("RGB", (4, 2)).save(turned, exif=exif)
    assert _open(turned).size == (2, 4)
