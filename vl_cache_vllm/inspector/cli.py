# SPDX-License-Identifier: Apache-2.0
"""The command ``vl-cache-inspect``.

vLLM reads environment variables when it is imported, so it is imported after they are set.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

NAME = "vl-cache-inspect"
POLICY = "vlcache"
USAGE = """%(prog)s --model MODEL --image PATH [--image PATH ...] --prompt TEXT
                        [--kv-compress POLICY] [--kv-compress-budget FLOAT]
                        [--kv-compress-config JSON] [--max-tokens N] [--output PREFIX] [flags]"""
DESCRIPTION = """
Run one request and write a picture (PNG) and a page (HTML) that show which tokens KV compression
kept. The default policy is vlcache.

All engine flags of vLLM are accepted. --help=inspect shows the flags of this command,
--help=kv-compress those of KV compression, --help=all shows all.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the request and write both files.

    Raises:
        SystemExit: with one message if any of this fails.
    """
    # With the engine in this process, its own error message reaches the user.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM sets it later
    _needs("matplotlib", "jinja2")
    parser = _parser()
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    if options.model is None:
        parser.error("give --model, the name or path of a vision-language model")
    if options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {options.max_tokens}")
    try:
        images = [(path.name, _open(path)) for path in options.image]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    output = options.output.with_name(options.output.name.removesuffix(".html"))
    output = output.with_name(output.name.removesuffix(".png"))
    try:
        _run(options, images, output)
    except (ValueError, RuntimeError, OSError, ImportError, AssertionError) as error:
        if os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG":
            raise
        hint = "(VLLM_LOGGING_LEVEL=DEBUG shows where)"
        raise SystemExit(f"{NAME}: error: {_message(error)}\n{hint}") from error


def _run(options: Any, images: list[tuple[str, Image.Image]], output: Path) -> None:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vl_cache_vllm.config import ADDITIONAL_CONFIG_KEY, with_current_names
    from vl_cache_vllm.inspector.engine import running
    from vl_cache_vllm.inspector.history import table
    from vl_cache_vllm.inspector.page import write_page
    from vl_cache_vllm.inspector.picture import write_picture
    from vl_cache_vllm.inspector.request import inspect_request

    if not hasattr(options, "kv_compress"):
        given = options.additional_config or {}
        if ADDITIONAL_CONFIG_KEY not in given:
            options.kv_compress = POLICY
    engine_args = EngineArgs.from_cli_args(options)
    settings = engine_args.additional_config.get(ADDITIONAL_CONFIG_KEY)
    if not settings:
        raise ValueError("--kv-compress none disables compression: choose a policy")
    settings = with_current_names(settings)
    if "trace" in settings:
        raise ValueError(f"{NAME} sets the trace options itself: remove trace")
    engine_args.disable_log_stats = True
    if not engine_args.limit_mm_per_prompt and images:
        engine_args.limit_mm_per_prompt = {"image": len(images)}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        tracing = {"path": str(trace), "positions": True, "scores": True}
        engine_args.additional_config = {
            **engine_args.additional_config,
            ADDITIONAL_CONFIG_KEY: {**settings, "trace": tracing},
        }
        with running(lambda: LLM.from_engine_args(engine_args)) as llm:
            inspection = inspect_request(
                llm,
                trace,
                Path(options.model).name if Path(options.model).exists() else options.model,
                options.prompt,
                images,
                _image_processor(engine_args),
                options.max_tokens,
            )
    eviction = inspection.eviction
    print(f"with eviction    {inspection.answer}")
    print(f"with full cache  {inspection.full_answer}")
    print(
        f"{eviction.prompt_tokens} prompt tokens, {eviction.prompt_blocks} blocks -> "
        f"{eviction.kept_blocks} ({eviction.retained:.0%})"
    )
    if len(inspection.history) > 1:
        print(table(inspection.history))
    for write, suffix in ((write_picture, ".png"), (write_page, ".html")):
        path = output.with_name(output.name + suffix)
        write(inspection, path)
        print(path)


def _parser() -> FlexibleArgumentParser:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vl_cache_vllm.plugin import register

    load_general_plugins()
    register()  # also if VLLM_PLUGINS lists only other plugins
    parser = FlexibleArgumentParser(prog=NAME, usage=USAGE, description=DESCRIPTION)
    group = parser.add_argument_group(
        title="inspect", description="The request and the output files."
    )
    add = group.add_argument
    add(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="Input image. Repeat the flag for several images, in the order of the prompt.",
    )
    add("--prompt", required=True, metavar="TEXT", help="Question about the images.")
    add("--max-tokens", type=int, default=128, help="Maximum number of output tokens.")
    add(
        "--output",
        type=Path,
        default=Path(NAME),
        metavar="PREFIX",
        help="Write PREFIX.png and PREFIX.html.",
    )
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None)
    return parser


def _needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{NAME}: error: {' and '.join(missing)} missing: pip install 'vl-cache-vllm[inspect]'"
        )


def _open(path: Path) -> Image.Image:
    """Load an image as RGB, rotated upright, with transparent areas filled white."""
    if not path.is_file():
        raise ValueError(f"no such image: {path}")
    try:
        image: Image.Image = Image.open(path)
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _image_processor(engine_args: EngineArgs) -> Any:
    """The model's image processor, or None if Transformers has none for it."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            engine_args.model,
            revision=engine_args.revision,
            trust_remote_code=engine_args.trust_remote_code,
            **(engine_args.mm_processor_kwargs or {}),
        )
    except Exception:  # remote code may raise anything, and it is optional
        return None
    return getattr(processor, "image_processor", None)


def _message(error: Exception) -> str:
    """The text of an error, without pydantic's URL and dump of the input."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "\n".join(str(e["msg"]).removeprefix("Value error, ") for e in errors())
    return str(error) or repr(error)


if __name__ == "__main__":
    main()
