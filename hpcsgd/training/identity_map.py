"""A map whose keys are objects by identity, which it does not keep alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class IdentityMap(Generic[Value]):
    """Maps objects to values, as a `WeakKeyDictionary` does, also objects without a hash."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Callable[[], Any], Value]] = {}

    def get(self, key: Any) -> Value | None:
        """Return the value of an object; None: it has none."""
        entry = self._entries.get(id(key))
        return entry[1] if entry is not None and entry[0]() is key else None

    def set(self, key: Any, value: Value) -> None:
        """Set the value of an object, which is dropped with it."""
        number, entries = id(key), self._entries
        try:
            reference: Callable[[], Any] = weakref.ref(key, lambda _: entries.pop(number, None))
        except TypeError:  # no weak references to objects with slots
            reference = lambda: key  # noqa: E731
        entries[number] = reference, value
