"""Registries whose entries are imported when they are used: names are known before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TypeVar

from hpcsgd.registry.specs import check_name

T = TypeVar("T")


class Rows(MutableMapping[str, Callable[..., T]]):
    """Callables by name; others may be added to it.

    Parameters
    ----------
    kind
        The kind of the entries, for errors: ``"strategy"``.
    package
        The package of the modules.
    rows
        ``"module.attribute"`` by name, below the package.

    Attributes
    ----------
    modules
        The module that defines each of these attributes.
    """

    def __init__(self, kind: str, package: str, rows: Mapping[str, str]) -> None:
        self._kind = kind
        self._rows: dict[str, Callable[..., T] | tuple[str, str]] = {}
        self.modules: dict[str, str] = {}
        for name, path in rows.items():
            module, _, attribute = f"{package}.{path}".rpartition(".")
            self._rows[name] = module, attribute
            self.modules[attribute] = module

    def check_name(self, spec: str) -> str:
        """Return the name in a spec, without an import; raise `BadOption` if it is none of these."""
        return check_name(self, spec, self._kind)

    def __getitem__(self, name: str) -> Callable[..., T]:
        row = self._rows[name]
        if isinstance(row, tuple):
            module, attribute = row
            row = self._rows[name] = getattr(import_module(module), attribute)
        return row

    def __setitem__(self, name: str, row: Callable[..., T]) -> None:
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows  # without its import

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

    def __len__(self) -> int:
        return len(self._rows)
