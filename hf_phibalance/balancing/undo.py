"""Attribute changes that can be taken back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..compat import keep_function


class MISSING:
    """Stands for an attribute that was not there; a class, because copies and pickles keep its identity."""


class Undo:
    """Attribute changes that can be taken back in reverse order, exactly: absence is restored as well."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        name = getattr(type(target), "attribute_map", {}).get(name, name)
        self._changes.append((target, name, vars(target).get(name, MISSING), value))
        setattr(target, name, value)

    def has_changed(self, name: str) -> bool:
        """Whether an attribute called `name` is changed at present."""
        return any(name == changed for _, changed, _, _ in self._changes)

    def restore(self) -> None:
        while self._changes:
            target, name, old, value = self._changes.pop()
            if callable(value) and vars(target).get(name) is not value:
                continue  # somebody has wrapped our method since; it does nothing any more
            if old is MISSING:
                vars(target).pop(name, None)
            else:
                setattr(target, name, old)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The original values, for the duration."""
        changes = list(self._changes)
        self.restore()
        try:
            yield
        finally:
            for target, name, _, value in changes:
                self.set(target, name, value)


def wrap_method(owner: Any, name: str, wrapper: Callable, undo: Undo) -> None:
    """Lets `owner.name(...)` be `wrapper(owner, inner, ...)`, once, in a way that copies and pickles of `owner` keep."""
    inner = getattr(owner, name)
    if getattr(inner, "func", None) is not wrapper:
        outer: Any = functools.update_wrapper(functools.partial(wrapper, owner, inner), inner)
        keep_function(outer, inner)
        undo.set(owner, name, outer)
