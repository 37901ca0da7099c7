# SPDX-License-Identifier: Apache-2.0
"""Policies by name, of this project and of other packages, from one entry point group."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from vl_cache_vllm.policy.base import EvictionPolicy

GROUP = "vl_cache_vllm.policies"


class Registry(Mapping[str, type[EvictionPolicy]]):
    """Maps the values of ``--kv-compress`` to policy classes, which are loaded on first access.

    Access raises KeyError if no package offers the policy, and ValueError if it cannot be used.
    """

    def __init__(self, entries: Iterable[EntryPoint]) -> None:
        self._entries: dict[str, list[EntryPoint]] = {}
        for entry in entries:
            self._entries.setdefault(entry.name, []).append(entry)

    def __getitem__(self, name: str) -> type[EvictionPolicy]:
        entry, *others = self._entries[name]
        if others:
            packages = ", ".join(_package(e) for e in (entry, *others))
            raise ValueError(
                f"KV compression policy {name!r} is offered by more than one package: {packages}; "
                "uninstall all but one"
            )
        where = f"KV compression policy {name!r} of {_package(entry)}, {entry.value},"
        try:
            policy = entry.load()
        except Exception as error:
            raise ValueError(
                f"{where} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(policy, type) and issubclass(policy, EvictionPolicy)):
            raise ValueError(f"{where} is no subclass of vl_cache_vllm.policy.EvictionPolicy")
        if not dataclasses.is_dataclass(policy) or getattr(policy, "name", None) != name:
            raise ValueError(
                f"{where} must be a frozen dataclass whose class variable `name` is {name!r}"
            )
        return policy

    def for_text(self) -> list[str]:
        """Names of the policies for prompts without images, without those that cannot be loaded."""

        def is_for_text(name: str) -> bool:
            try:
                return self[name].for_text
            except ValueError:
                return False

        return [name for name in self if is_for_text(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"


POLICIES = Registry(entry_points(group=GROUP))
