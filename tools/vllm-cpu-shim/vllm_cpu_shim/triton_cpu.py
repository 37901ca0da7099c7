# SPDX-License-Identifier: Apache-2.0
"""The least a Triton backend must be so that vLLM finds one named ``cpu``; it compiles nothing.

Kernels run through Triton's interpreter, which never asks the backend for code.
"""

from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase


class CPUBackend(BaseBackend):
    binary_ext = "none"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "cpu-interpreter"

    def parse_options(self, options: dict) -> object:
        raise RuntimeError("the cpu backend only serves Triton's interpreter")

    def add_stages(self, stages: dict, options: object) -> None:
        raise RuntimeError("the cpu backend only serves Triton's interpreter")

    def load_dialects(self, context) -> None:
        return None

    def get_module_map(self) -> dict:
        return {}


class CPUDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("the cpu backend only serves Triton's interpreter")

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench
