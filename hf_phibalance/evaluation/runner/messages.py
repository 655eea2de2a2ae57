"""Messages between the judge and the program: lines of JSON, in which values cross as plain data."""

from __future__ import annotations

import collections
import importlib
import itertools
import json
from typing import Any, BinaryIO


MAX_MESSAGE = 64 << 20  # bytes
MAX_ITEMS = 1_000_000  # of an iterator that the program returns

MUTABLE: tuple[Any, ...] = (list, dict, set, collections.deque, bytearray)
IMMUTABLE: tuple[Any, ...] = (tuple, frozenset, bytes)
# Functions that build the other types from their parts.
BUILDERS = {
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "Decimal": lambda parts: importlib.import_module("decimal").Decimal(*parts),
    "Fraction": lambda parts: importlib.import_module("fractions").Fraction(*parts),
    "dict_keys": lambda parts: dict.fromkeys(parts).keys(),
    "dict_values": lambda parts: dict(enumerate(parts)).values(),
    "dict_items": lambda parts: dict(parts).items(),
    "iterator": lambda parts: iter([*parts]),
    **{kind.__name__: kind for kind in IMMUTABLE},
}


def send(file: BinaryIO, message: Any) -> None:
    """Writes a message. Raises `ValueError` if it is too long."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > MAX_MESSAGE:
        raise ValueError(f"a value of {len(line)} bytes is more than the {MAX_MESSAGE} that can cross")
    file.write(line)
    file.flush()


def receive(file: BinaryIO) -> Any:
    """Reads the next message. Raises `EOFError` if there is none, `ValueError` if it is no JSON."""
    line = file.readline(MAX_MESSAGE)
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


class Crossing:
    """
    Encodes and decodes the values of one call and its answer.

    Whatever the program sends, only numbers, text and containers of them can come out, so it can answer wrongly but not
    cheat. Subclasses become the built-in type (a `Counter` a `dict`), scalars of numpy become numbers.

    Each side numbers the mutable containers in the order in which they cross. So both know which objects correspond,
    and the judge can repeat what the program did to an argument.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        """Returns a value in JSON's types. Raises `TypeError` if something in it is not plain data."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if id(value) in self._numbers:
            return {"same": self._numbers[id(value)]}
        for kind in (*MUTABLE, *IMMUTABLE):
            if isinstance(value, kind):
                if kind in MUTABLE:
                    self._number(value)
                return {kind.__name__: self.contents(value)}
        name, module = type(value).__name__, type(value).__module__
        if name in ("dict_keys", "dict_values", "dict_items"):
            return {name: self.contents(value)}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if name in ("Decimal", "Fraction"):
            return {name: [str(value)]}
        if module == "numpy" and getattr(value, "shape", None) == ():
            return self.encode(value.item())
        if hasattr(type(value), "__next__"):
            items = [*itertools.islice(value, MAX_ITEMS + 1)]
            if len(items) > MAX_ITEMS:
                raise TypeError(f"an iterator of more than {MAX_ITEMS} items")
            return {"iterator": self.contents(items)}
        raise TypeError(f"a value of type {name}, which is not plain data that the checks can compare")

    def contents(self, container: Any) -> list:
        """Returns the items of a container, encoded."""
        return [self.encode(item) for item in (container.items() if isinstance(container, dict) else container)]

    def decode(self, data: Any) -> Any:
        """Inverse of `encode`. Raises any `Exception` if `data` was not made by it."""
        if not isinstance(data, dict):
            return data
        ((name, content),) = data.items()
        if name == "same":
            return self.objects[content]
        for kind in MUTABLE:
            if kind.__name__ == name:
                self._number(value := kind())
                self.fill(value, content)
                return value
        return BUILDERS[name](self.decode(item) for item in content)

    def fill(self, container: Any, content: list) -> None:
        """Replaces the items of a mutable container by encoded ones."""
        items = [self.decode(item) for item in content]
        container.clear()
        if isinstance(container, dict):
            for key, item in items:
                container[key] = item
        elif isinstance(container, set):
            container.update(items)
        else:
            container.extend(items)

    def _number(self, value: Any) -> None:
        self._numbers[id(value)] = len(self.objects)
        self.objects.append(value)


def describe(error: BaseException) -> str:
    """Returns an exception's type and text."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
