# SPDX-License-Identifier: Apache-2.0
"""Flags, `additional_config`, help, and what is refused at start-up."""

import dataclasses
import importlib
import json
import operator
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # since 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from testing import tiny_models
from testing.server import command, environment
from vl_cache_vllm import hooks, install
from vl_cache_vllm.config import KVCompressConfig, get_kv_compress_config
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.support import unsupported_reasons


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


def engine_args(model: Path, *flags: str) -> EngineArgs:
    """What ``vllm serve MODEL FLAGS`` makes of its command line."""
    parser = make_arg_parser(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *flags]))


def config(model: Path, *flags: str) -> VllmConfig:
    return engine_args(model, "--max-model-len=1024", *flags).create_engine_config()


def test_off_by_default(model: Path) -> None:
    stock = config(model)
    assert get_kv_compress_config(stock) is None
    assert stock.additional_config == {}
    assert stock.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert stock.scheduler_config.scheduler_cls is None
    assert config(model, "--kv-compress=none").additional_config == {}


def test_flags_and_python_agree(model: Path) -> None:
    flags = config(
        model,
        "--kv-compress=vlcache",
        "--kv-compress-budget=0.2",
        "--kv-compress-when=pressure",
        '--kv-compress-config={"pooling": 3, "uniform_mix": 0.8}',
    )
    expected = {
        "policy": "vlcache",
        "budget": 0.2,
        "when": "pressure",
        "pooling": 3,
        "uniform_mix": 0.8,
    }
    python = EngineArgs(
        model=str(model), max_model_len=1024, additional_config={"kv_compress": expected}
    ).create_engine_config()
    assert get_kv_compress_config(flags) == get_kv_compress_config(python)
    assert get_kv_compress_config(flags).budget == 0.2
    assert get_kv_compress_config(flags).when == "pressure"
    for vllm_config in (flags, python):
        assert vllm_config.parallel_config.worker_cls.endswith("EvictionCPUWorker")
        assert vllm_config.scheduler_config.scheduler_cls.startswith("vl_cache_vllm.")


def test_the_compile_cache_tells_settings_apart(model: Path) -> None:
    on = "--kv-compress=vlcache"
    hashes = {
        config(model, *flags).compute_hash()
        for flags in ([], [on], [on, "--kv-compress-budget=0.3"])
    }
    assert len(hashes) == 3


def test_install_is_idempotent() -> None:
    add, create = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    install.install()
    assert EngineArgs.add_cli_args is add and EngineArgs.create_engine_config is create


def test_help_lists_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help=kv-compress"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in (
        "--kv-compress ",
        "--kv-compress-budget",
        "--kv-compress-when",
        "--kv-compress-text",
        "--kv-compress-config",
        "recent_ratio",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-compress-budget=0"], "greater than 0 and at most 1"),
        (["--kv-compress-budget=1.5"], "greater than 0 and at most 1"),
        (["--kv-compress-budget=7"], "greater than 0 and at most 1"),
        (["--kv-compress-budget=7"], "'7' is not a budget"),
        (["--kv-compress-budget=abc"], "'abc' is not a budget"),
        (["--kv-compress-budget=nan"], "'nan' is not a budget"),
        (["--kv-compress-when=sometimes"], "invalid choice: 'sometimes'"),
        (["--kv-compress=snapcache"], "invalid choice: 'snapcache'"),
        (["--kv-compress-config={"], "not valid JSON"),
        (["--kv-compress-config=" + '{"a":' * 5000], "not valid JSON"),
        (["--kv-compress-config=[1]"], "must be a JSON object"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flag(
    model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """argparse's one-line error and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        engine_args(model, "--kv-compress=vlcache", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (['--kv-compress-config={"treshold": 0.1}', "--kv-compress=vlcache"], "known for policy"),
        (
            ['--kv-compress-config={"x": 1}', "--kv-compress=vlcache"],
            r"unknown KV compression setting\(s\) 'x'",
        ),
        (['--kv-compress-config={"pooling": 2}', "--kv-compress=vlcache"], "odd"),
        (['--kv-compress-config={"budget": 0.2}', "--kv-compress=vlcache"], "--kv-compress-budget"),
        (
            ['--kv-compress-config={"when": "always"}', "--kv-compress=vlcache"],
            "--kv-compress-when",
        ),
        (["--kv-compress-budget=0.2"], "off"),
        (["--kv-compress-when=pressure"], "off"),
        (["--kv-compress-text"], "off"),
        (["--kv-compress-text", "--kv-compress=vlcache"], "not defined for text-only prompts"),
        (
            ["--kv-compress=vlcache", '--additional-config={"kv_compress": {"policy": "vlcache"}}'],
            "use one of them",
        ),
        (['--additional-config={"kv_compress": {"policy": "h3o"}}'], "unknown KV compression pol"),
        (['--additional-config={"kv_compress": 3}'], "must be a JSON object"),
        (
            ["--kv-compress=none", '--additional-config={"kv_compress": {"policy": "vlcache"}}'],
            "use one of them",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings(model: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(model, *flags)


def _set(path: str, value: Any) -> Callable[[VllmConfig], None]:
    *parents, name = path.split(".")

    def apply(vllm_config: VllmConfig) -> None:
        target: Any = vllm_config
        for parent in parents:
            target = getattr(target, parent)
        object.__setattr__(target, name, value)

    return apply


def _hybrid_in_one_group(vllm_config: VllmConfig) -> None:
    layer_types = ["full_attention", "sliding_attention"]
    _set("model_config.hf_text_config.layer_types", layer_types)(vllm_config)
    _set("scheduler_config.disable_hybrid_kv_cache_manager", True)(vllm_config)


REFUSALS = {
    "decode context parallel": (
        _set("parallel_config.decode_context_parallel_size", 2),
        "context parallelism",
    ),
    "prefill context parallel": (
        _set("parallel_config.prefill_context_parallel_size", 2),
        "context parallelism",
    ),
    "micro-batching": (_set("parallel_config.enable_dbo", True), "micro-batching"),
    "KV connector": (_set("kv_transfer_config", object()), "KV connectors"),
    "KV offloading": (_set("cache_config.kv_offloading_size", 1.0), "KV connectors"),
    "speculative decoding": (
        _set("speculative_config", SimpleNamespace(method="eagle")),
        "draft model",
    ),
    "other cache": (_set("cache_config.cache_dtype", "fp8_inc"), "KV cache type fp8_inc"),
    "HiSparse": (_set("attention_config.hisparse_config", object()), "HiSparse"),
    "other scheduler": (_set("scheduler_config.scheduler_cls", "a.B"), "--scheduler-cls"),
    "other worker": (_set("parallel_config.worker_cls", "a.B"), "worker a.B"),
    "sliding window": (
        _set("model_config.hf_text_config.sliding_window", 100),
        "no layers of full attention",
    ),
    "hybrid without its cache manager": (_hybrid_in_one_group, "--disable-hybrid-kv-cache-manager"),
    "chunked attention": (
        _set("model_config.hf_text_config.layer_types", ["full_attention", "chunked_attention"]),
        "chunked_attention",
    ),
    "linear attention": (
        _set("model_config.hf_text_config.layer_types", ["full_attention", "linear_attention"]),
        "linear_attention",
    ),
    "pooling": (_set("model_config.runner_type", "pooling"), "pooling models"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(model: Path, name: str) -> None:
    apply, reason = REFUSALS[name]
    vllm_config = _with_settings(config(model))
    apply(vllm_config)
    with pytest.raises(ValueError, match=r"cannot be used with this configuration") as error:
        install.enable(vllm_config)
    assert reason in str(error.value)
    assert str(error.value).count("\n  - ") == 1


def test_the_rust_front_end_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = _with_settings(config(model))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="unset VLLM_USE_RUST_FRONTEND"):
        install.enable(vllm_config)


def test_all_reasons_come_in_one_message(model: Path) -> None:
    vllm_config = _with_settings(config(model))
    for name in ("other cache", "speculative decoding", "micro-batching"):
        REFUSALS[name][0](vllm_config)
    with pytest.raises(ValueError) as error:
        install.enable(vllm_config)
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--language-model-only", "text-only serving"),
        ("--mm-encoder-only", "encoder-only serving"),
        ("--kv-offloading-size=1", "KV connectors and offloading"),
    ],
)
def test_refused_flag(model: Path, flag: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config(model, "--kv-compress=vlcache", flag)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("use_mla", "MLA"),
        ("is_encoder_decoder", "cross attention"),
        ("is_hybrid", "state-space"),
        ("uses_alibi", "ALiBi"),
    ],
)
def test_refused_model(model: Path, attribute: str, reason: str) -> None:
    """Properties that vLLM derives from the architecture, shown through a stand-in model config."""
    vllm_config = config(model)
    real = vllm_config.model_config
    names = ("use_mla", "is_encoder_decoder", "is_hybrid", "is_attention_free")
    fake = types.SimpleNamespace(
        hf_text_config=real.hf_text_config,
        get_sliding_window=real.get_sliding_window,
        runner_type=real.runner_type,
        supports_multimodal_inputs=True,
        multimodal_config=None,
        uses_alibi=False,
        **dict.fromkeys(names, False),
    )
    setattr(fake, attribute, True)
    object.__setattr__(vllm_config, "model_config", fake)
    (found,) = unsupported_reasons(vllm_config, ("vllm.v1.worker.cpu_worker.CPUWorker",))
    assert reason in found


def test_unsupported_vllm_version(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.34.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.34\.1: this version of vl-cache-vllm supports"):
        install.enable(_with_settings(config(model)))


def _with_settings(vllm_config: VllmConfig) -> VllmConfig:
    object.__setattr__(vllm_config, "additional_config", {"kv_compress": {"policy": "vlcache"}})
    return vllm_config


@pytest.mark.slow
def test_vllm_serve_exits(model: Path) -> None:
    """The whole program, refused by the last of the checks above; others run in this process."""
    flags = ("--kv-compress=vlcache", "--max-model-len=1024", "--kv-cache-dtype=fp8_inc")
    result = subprocess.run(
        command(model, *flags), env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "KV cache type fp8_inc" in result.stderr


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.target)
def test_hook_exists_in_this_vllm(hook: hooks.Hook) -> None:
    assert hook.kind in ("extension point", "wrap")
    assert hook.scope and hook.reason
    module, name = hook.target.split(":")
    if module == "vllm.platforms.cuda":
        pytest.skip("imports the CUDA build's operators; tests/contract reads its source")
    assert operator.attrgetter(name)(importlib.import_module(module)) is not ...


def test_the_readme_lists_every_setting() -> None:
    """With its default, in the same words as --help."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    fields = (*dataclasses.fields(VLCachePolicy), *dataclasses.fields(KVCompressConfig))
    for field in fields:
        if field.name in ("policy", "budget", "when", "text"):
            continue
        row = f"| `{field.name}` | {json.dumps(field.default)} | {field.metadata['help']} |"
        assert row in text, row
