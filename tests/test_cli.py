# SPDX-License-Identifier: Apache-2.0
"""Flags, `additional_config`, help, and what is refused at start-up."""

import dataclasses
import importlib
import json
import operator
import re
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # since 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from testing import tiny_models
from testing.server import command, environment
from vl_cache_vllm import deprecated, hooks, install
from vl_cache_vllm.config import KVCompressConfig, describe_settings, get_kv_compress_config
from vl_cache_vllm.core import connectors
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


def _drafts(stages: int = 1, windows: bool = False, **changed: Any) -> Callable[[VllmConfig], None]:
    """An MTP module, with settings of vLLM's that are refused."""

    def apply(vllm_config: VllmConfig) -> None:
        values: dict[str, Any] = dict(
            method="mtp",
            draft_tensor_parallel_size=1,
            use_multi_module_mtp=lambda: False,
            parallel_drafting=False,
            disable_padded_drafter_batch=False,
        )
        _set("speculative_config", SimpleNamespace(**{**values, **changed}))(vllm_config)
        _set("parallel_config.pipeline_parallel_size", stages)(vllm_config)
        if windows:
            kinds = ["full_attention", "sliding_attention"]
            _set("model_config.hf_text_config.layer_types", kinds)(vllm_config)

    return apply


def _hybrid_in_one_group(vllm_config: VllmConfig) -> None:
    layer_types = ["full_attention", "sliding_attention"]
    _set("model_config.hf_text_config.layer_types", layer_types)(vllm_config)
    _set("scheduler_config.disable_hybrid_kv_cache_manager", True)(vllm_config)


def _transfers(**fields: Any) -> Callable[[Any], None]:
    return _set("kv_transfer_config", KVTransferConfig(kv_role="kv_both", **fields))


REFUSALS = {
    "decode context parallel": (
        _set("parallel_config.decode_context_parallel_size", 2),
        "context parallelism: remove --decode-context-parallel-size 2",
    ),
    "prefill context parallel": (
        _set("parallel_config.prefill_context_parallel_size", 2),
        "context parallelism: remove --prefill-context-parallel-size 2",
    ),
    "micro-batching": (_set("parallel_config.enable_dbo", True), "remove --enable-dbo"),
    "micro-batches": (_set("parallel_config.ubatch_size", 2), "remove --ubatch-size 2"),
    "KV connector": (_transfers(kv_connector="MooncakeConnector"), "remove --kv-transfer-config"),
    "KV connector of a pair": (
        _transfers(
            kv_connector="MultiConnector",
            kv_connector_extra_config={
                "connectors": [{"kv_connector": "NixlConnector"}, {"kv_connector": "Mine"}]
            },
        ),
        "KV connector Mine: use ExampleConnector, LMCacheMPConnector, ",
    ),
    "LMCache in a pair": (
        _transfers(
            kv_connector="MultiConnector",
            kv_connector_extra_config={
                "connectors": [
                    {"kv_connector": "LMCacheMPConnector"},
                    {"kv_connector": "OffloadingConnector"},
                ]
            },
        ),
        "LMCacheMPConnector in a MultiConnector: use it alone",
    ),
    "LMCache that stores answers": (
        _transfers(
            kv_connector="LMCacheMPConnector",
            kv_connector_extra_config={"lmcache.mp.save_decode_cache": True},
        ),
        "LMCache's lmcache.mp.save_decode_cache, which",
    ),
    "LMCache that stores late": (
        _transfers(
            kv_connector="LMCacheMPConnector",
            kv_connector_extra_config={"lmcache.mp.lazy_offload": True},
        ),
        "LMCache's lmcache.mp.lazy_offload, which",
    ),
    "KV connector of one's own": (
        _transfers(kv_connector="NixlConnector", kv_connector_module_path="mine"),
        "remove kv_connector_module_path",
    ),
    "KV transfer in both directions": (
        _transfers(
            kv_connector="NixlConnector", kv_connector_extra_config={"bidirectional_kv_xfer": True}
        ),
        "remove bidirectional_kv_xfer",
    ),
    "speculative decoding": (
        _set("speculative_config", SimpleNamespace(method="eagle")),
        "drafts of the kind eagle: use eagle3, mtp or ngram",
    ),
    "several MTP modules": (
        _drafts(use_multi_module_mtp=lambda: True),
        "several MTP modules: remove",
    ),
    "parallel drafting": (_drafts(parallel_drafting=True), "remove parallel_drafting"),
    "draft batches": (
        _drafts(disable_padded_drafter_batch=True),
        "remove disable_padded_drafter_batch",
    ),
    "a draft model on one worker": (
        _drafts(draft_tensor_parallel_size=2),
        "a draft model on 2 of 1 workers: remove draft_tensor_parallel_size",
    ),
    "drafts and pipeline stages": (_drafts(stages=2), "drafts of a model on several pipeline"),
    "drafts and windows": (_drafts(windows=True), "drafts of a model whose layers"),
    "other cache": (_set("cache_config.cache_dtype", "fp8_inc"), "KV cache type fp8_inc"),
    "layers that skip the prefill": (
        _set("cache_config.kv_sharing_fast_prefill", True),
        "remove --kv-sharing-fast-prefill",
    ),
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
        ("--language-model-only", "remove --language-model-only"),
        ("--mm-encoder-only", "encoder-only serving"),
    ],
)
def test_refused_flag(model: Path, flag: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config(model, "--kv-compress=vlcache", flag)


def test_a_backend_of_offloading_is_refused(model: Path) -> None:
    vllm_config = _with_settings(config(model))
    _set("cache_config.kv_offloading_size", 1.0)(vllm_config)
    _transfers(kv_connector="HF3FSKVConnector")(vllm_config)
    with pytest.raises(ValueError, match=r"HF3FSKVConnector: .*, or remove --kv-offloading-size$"):
        install.enable(vllm_config)


@pytest.mark.parametrize(
    ("installed", "named"), [(None, r"\(not installed\)"), ("0.5.5", r"0\.5\.5")]
)
def test_other_releases_of_lmcache_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, named: str
) -> None:
    monkeypatch.setattr(connectors, "lmcache_version", lambda: installed)
    vllm_config = _with_settings(config(model))
    _transfers(kv_connector="LMCacheMPConnector")(vllm_config)
    with pytest.raises(ValueError, match=rf"LMCache {named}: install lmcache 0\.5\.6, "):
        install.enable(vllm_config)


@pytest.mark.parametrize(
    "name",
    [
        "ExampleConnector",
        "LMCacheMPConnector",
        "NixlConnector",
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
    ],
)
def test_connectors_are_accepted(model: Path, name: str) -> None:
    vllm_config = _with_settings(config(model))
    _transfers(kv_connector=name)(vllm_config)
    if name == "ExampleConnector":
        with pytest.raises(ValueError, match="add --no-enable-chunked-prefill"):
            install.enable(vllm_config)
        _set("scheduler_config.enable_chunked_prefill", False)(vllm_config)
    install.enable(vllm_config)


def test_only_offloading_is_accepted_beside_other_layers(model: Path) -> None:
    vllm_config = _with_settings(config(model))
    _set("model_config.hf_text_config.layer_types", ["full_attention", "sliding_attention"])(
        vllm_config
    )
    _set("speculative_config", SimpleNamespace(method="ngram"))(vllm_config)
    _transfers(kv_connector="NixlConnector")(vllm_config)
    with pytest.raises(ValueError, match="NixlConnector with a model whose layers do not all have"):
        install.enable(vllm_config)
    _transfers(kv_connector="OffloadingConnector")(vllm_config)
    install.enable(vllm_config)


def test_connectors_that_were_not_run_with_latent_attention_are_refused(model: Path) -> None:
    vllm_config = _with_settings(config(model))
    _pretend(vllm_config, "use_mla")
    for name, is_refused in (("NixlConnector", True), ("OffloadingConnector", False)):
        _transfers(kv_connector=name)(vllm_config)
        reasons = unsupported_reasons(vllm_config, ("vllm.v1.worker.cpu_worker.CPUWorker",))
        assert any(f"{name} with multi-head latent" in one for one in reasons) == is_refused


POLICY_FLAGS = (["--kv-compress=vlcache"], ["--kv-compress=snapkv", "--kv-compress-text"])


def _refusal(model: Path, *flags: str) -> str:
    with pytest.raises(ValueError, match="cannot be used with this configuration") as error:
        config(model, *flags)
    (reason,) = str(error.value).split("\n  - ")[1:]
    return reason


@pytest.mark.parametrize("policy", POLICY_FLAGS, ids=["vlcache", "snapkv-text"])
@pytest.mark.parametrize("limits", ['{"image": 0, "video": 0}', '{"image": {"count": 0}}'])
def test_a_refusal_names_the_limits_that_were_given(
    model: Path, policy: list[str], limits: str
) -> None:
    reason = _refusal(model, *policy, f"--limit-mm-per-prompt={limits}")
    assert "at least one image or video in --limit-mm-per-prompt, now {" in reason
    assert "--language-model-only" not in reason
    assert '"image": 0' in reason and ('"video": 0' in reason) == ("video" in limits)


@pytest.mark.parametrize("policy", POLICY_FLAGS, ids=["vlcache", "snapkv-text"])
def test_a_refusal_holds_for_policies_that_need_no_image(
    model: Path, policy: list[str], tmp_path: Path
) -> None:
    """Neither a flag that nobody gave, nor a score that the policy does not compute."""
    only = _refusal(model, *policy, "--language-model-only")
    assert only == "text-only serving of a vision-language model: remove --language-model-only"
    text = json.loads((model / "config.json").read_text())["text_config"]
    text_model = tmp_path / "text"
    shutil.copytree(model, text_model, ignore=shutil.ignore_patterns("*.safetensors"))
    (text_model / "config.json").write_text(
        json.dumps(text | {"architectures": ["LlamaForCausalLM"]})
    )
    reason = _refusal(text_model, *policy)
    assert reason.startswith("a text-only model: only vision-language models are supported")
    assert "--language-model-only" not in reason and "scores" not in reason


def test_models_that_take_embeddings_of_images_are_served(model: Path) -> None:
    """vLLM's own rule: no image may be encoded, but its embeddings may be sent."""
    flags = ('--limit-mm-per-prompt={"image": 0}', "--enable-mm-embeds")
    assert get_kv_compress_config(config(model, "--kv-compress=vlcache", *flags)) is not None


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("is_encoder_decoder", "cross attention"),
        ("is_attention_free", "without attention layers"),
        ("uses_alibi", "ALiBi"),
        ("rswa_window", "R-SWA"),
    ],
)
def test_refused_model(model: Path, attribute: str, reason: str) -> None:
    """Properties that vLLM derives from the architecture."""
    vllm_config = config(model)
    _pretend(vllm_config, attribute)
    (found,) = unsupported_reasons(vllm_config, ("vllm.v1.worker.cpu_worker.CPUWorker",))
    assert reason in found


def _pretend(vllm_config: VllmConfig, attribute: str) -> None:
    """Put a stand-in for the model config, of which an attribute is true."""
    real = vllm_config.model_config
    names = ("use_mla", "is_encoder_decoder", "is_hybrid", "is_attention_free")
    fake = types.SimpleNamespace(
        hf_text_config=real.hf_text_config,
        get_sliding_window=real.get_sliding_window,
        runner_type=real.runner_type,
        supports_multimodal_inputs=True,
        multimodal_config=None,
        uses_alibi=False,
        rswa_window=None,
        **dict.fromkeys(names, False),
    )
    setattr(fake, attribute, True)
    object.__setattr__(vllm_config, "model_config", fake)


@pytest.mark.parametrize(
    ("attribute", "reason"), [("is_hybrid", "state spaces"), ("use_mla", "latent attention")]
)
def test_drafts_of_some_models_are_refused(model: Path, attribute: str, reason: str) -> None:
    vllm_config = config(model)
    _pretend(vllm_config, attribute)
    worker = ("vllm.v1.worker.cpu_worker.CPUWorker",)
    assert unsupported_reasons(vllm_config, worker) == []
    _set("speculative_config", SimpleNamespace(method="ngram"))(vllm_config)
    (found,) = unsupported_reasons(vllm_config, worker)
    assert found.endswith(f"{reason}: remove --speculative-config")


def test_other_kernels_of_latent_attention_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ("vllm.v1.worker.cpu_worker.CPUWorker",)
    vllm_config = config(model)
    _pretend(vllm_config, "use_mla")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    (reason,) = unsupported_reasons(vllm_config, worker)
    assert reason.endswith("use --attention-backend CPU_MLA")
    vllm_config = config(model, "--attention-backend=CPU_MLA")
    _pretend(vllm_config, "use_mla")
    assert unsupported_reasons(vllm_config, worker) == []
    _set("cache_config.cache_dtype", "fp8")(vllm_config)
    (reason,) = unsupported_reasons(vllm_config, worker)
    assert "KV cache type fp8 with multi-head latent attention" in reason


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
        pytest.skip("imports the CUDA build's operators; checks/contract reads its source")
    assert operator.attrgetter(name)(importlib.import_module(module)) is not ...


DOCUMENT = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()


def test_the_docs_list_every_setting_of_help() -> None:
    """Under the same headings, with the same defaults and in the same words."""
    sections = dict(re.findall(r"^### (.+)\n((?:(?!#).*\n)*)", DOCUMENT, re.M))
    documented = {
        title: re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| (.+) \|$", text, re.M)
        for title, text in sections.items()
    }
    expected: dict[str, list[tuple[str, ...]]] = {}
    title = ""
    for line in describe_settings().splitlines():
        if match := re.fullmatch(r"- ([\w.]+) \(default (.+?)\): (.+)", line):
            group, _, _ = match[1].rpartition(".")
            expected.setdefault(f"`{group}`" if group else title, []).append(match.groups())
        else:
            heading = re.split(":|, otherwise", line[2:])[0]
            title = re.sub("^POLICY (.+)", r"`\1`", heading).replace("EVERY POLICY", "Every policy")
    assert {title: rows for title, rows in documented.items() if rows} == expected


def test_the_docs_list_every_flag_and_its_setting() -> None:
    for name in ("budget", "when", "text"):
        (field,) = (f for f in dataclasses.fields(KVCompressConfig) if f.name == name)
        start = f"| `{name}` | `--kv-compress-{name}` | `{json.dumps(field.default)}` | "
        (row,) = (line for line in DOCUMENT.splitlines() if line.startswith(start))
        assert field.metadata["help"] in row


def test_the_docs_list_every_old_name() -> None:
    for old, new in deprecated.SETTINGS.items():
        assert f"| `{old}` | `{new}` |" in DOCUMENT
    for name in deprecated.WITHOUT_EFFECT:
        assert f"| `{name}`, with a policy that does not have it | ignored |" in DOCUMENT


def test_old_names_in_flags_reach_no_other_process(model: Path) -> None:
    args = engine_args(
        model,
        "--kv-compress=vlcache",
        '--kv-compress-config={"trace_path": "t", "diversity": 0.5, "trace": {"scores": true}}',
    )
    assert args.additional_config["kv_compress"] == {
        "policy": "vlcache",
        "trace": {"path": "t", "scores": True},
        "experimental": {"diversity": 0.5},
    }


def test_settings_by_dotted_flags(model: Path) -> None:
    """vLLM's own way to write nested JSON."""
    args = engine_args(
        model,
        "--kv-compress=vlcache",
        "--kv-compress-when=pressure",
        "--kv-compress-config.pressure.high=0.8",
        "--kv-compress-config.sink_tokens",
        "4",
    )
    config = KVCompressConfig.from_dict(args.additional_config["kv_compress"])
    assert config is not None
    assert (config.pressure.high, config.policy.sink_tokens) == (0.8, 4)
