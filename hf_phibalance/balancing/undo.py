"""Changes of a model that can be undone. They do not keep the model alive, and its copies and pickles have them too."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class MISSING:
    """Stands for a missing attribute; a class, because copies and pickles keep its identity."""


class Undo:
    """Attribute changes that `restore` undoes in reverse order; attributes that were missing are removed again."""

    def __init__(self) -> None:
        self._changes: list[tuple[weakref.ref[Any], str, Any, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        name = getattr(type(target), "attribute_map", {}).get(name, name)
        self._changes.append((weakref.ref(target), name, vars(target).get(name, MISSING), value))
        setattr(target, name, value)

    def restore(self) -> None:
        while self._changes:
            reference, name, old, value = self._changes.pop()
            target = reference()
            if target is None or (isinstance(value, WrappedMethod) and vars(target).get(name) is not value):
                continue  # our method was wrapped since; it does nothing any more
            if old is MISSING:
                vars(target).pop(name, None)
            else:
                setattr(target, name, old)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context manager: restores the original values inside it."""
        changes = list(self._changes)
        self.restore()
        try:
            yield
        finally:
            for reference, name, _, value in changes:
                if (target := reference()) is not None:
                    self.set(target, name, value)

    def __getstate__(self) -> list[tuple]:
        return [(target, *change) for reference, *change in self._changes if (target := reference()) is not None]

    def __setstate__(self, changes: list[tuple]) -> None:
        self._changes = [(weakref.ref(target), *change) for target, *change in changes]

    def __deepcopy__(self, memo: dict[int, Any]) -> Undo:
        twin = Undo()
        for target, *change in self.__getstate__():
            copied = memo.get(id(target)) if isinstance(target, nn.Module) else copy.deepcopy(target, memo)
            if copied is not None:
                twin._changes.append((weakref.ref(copied), *copy.deepcopy(change, memo)))
        return twin


class WrappedMethod:
    """
    Stands in for the method `name` of a module: calls `wrapper(owner, inner, ...)`.

    Args:
        owner (`torch.nn.Module`): the module.
        name (`str`): of the method.
        wrapper (`Callable`): a function of a module, so that it can be pickled.
        own (`Callable`, *optional*): the instance's own method, if it had one (accelerate sets such).
    """

    def __init__(self, owner: nn.Module, name: str, wrapper: Callable, own: Callable | None = None) -> None:
        self._owner, self._name, self._wrapper, self.own = weakref.ref(owner), name, wrapper, own
        method = getattr(type(owner), name)
        self.__name__, self.__doc__ = name, method.__doc__
        self.__func__ = method  # TRL 1.9 reads the signature of `model.forward.__func__`
        self.__signature__ = inspect.signature(functools.partial(method, owner) if own is None else own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        inner = self.own or functools.partial(getattr(type(owner), self._name), owner)
        return self._wrapper(owner, inner, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return type(self), (self._owner(), self._name, self._wrapper, self.own)

    def __deepcopy__(self, memo: dict[int, Any]) -> WrappedMethod:
        owner: Any = self._owner()
        return WrappedMethod(memo.get(id(owner), owner), self._name, self._wrapper, copy.deepcopy(self.own, memo))


def wrap_method(owner: nn.Module, name: str, wrapper: Callable, undo: Undo) -> None:
    """Replaces `owner.name(...)` by `wrapper(owner, inner, ...)`."""
    undo.set(owner, name, WrappedMethod(owner, name, wrapper, vars(owner).get(name)))
