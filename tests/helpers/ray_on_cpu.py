# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's Ray executor run CPU workers: the platform names no resource for Ray to hand out.

Stands in for a cluster whose nodes have devices; everything else is vLLM's and Ray's own.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ray
from vllm.platforms.cpu import CpuPlatform

ROOT = Path(__file__).parents[2]
RESOURCE = "NPU"  # any kind that Ray itself can count


def name_the_resource() -> None:
    """Run by Ray at the start of each of its processes."""
    CpuPlatform.ray_device_key = RESOURCE


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[None]:
    """A Ray of this machine alone."""
    before = CpuPlatform.ray_device_key
    name_the_resource()
    ray.init(
        num_cpus=workers,
        resources={RESOURCE: workers},
        include_dashboard=False,
        configure_logging=False,
        runtime_env={
            "worker_process_setup_hook": name_the_resource,
            "env_vars": {"PYTHONPATH": str(ROOT)},  # where its processes find this module
        },
    )
    try:
        yield
    finally:
        ray.shutdown()
        CpuPlatform.ray_device_key = before
