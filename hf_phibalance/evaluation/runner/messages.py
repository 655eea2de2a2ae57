"""
What the processes say to each other over their pipes, and how values cross.

A message is a frame: four bytes of length, then JSON. Values cross as plain data, see `encode` and `decode`: whatever
the program sends, only numbers, text and containers of them can come out, so it can answer wrongly but not cheat.
"""

from __future__ import annotations

import builtins
import collections
import json
import os
from typing import Any


MAX_FRAME = 64 << 20
MAX_ITEMS = 1_000_000  # of an iterator that the program returns
MAX_REASON = 500


def frame(message: Any) -> bytes:
    """`message` as bytes for a pipe."""
    data = json.dumps(message).encode()
    if len(data) > MAX_FRAME:
        raise ValueError(f"a message of {len(data)} bytes is more than the {MAX_FRAME} that can cross")
    return len(data).to_bytes(4, "big") + data


def send(descriptor: int, message: Any) -> None:
    data = memoryview(frame(message))
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """The next message, or `EOFError` if the other side is gone or sends none."""
    size = int.from_bytes(_read(descriptor, 4), "big")
    if size > MAX_FRAME:
        raise EOFError(f"a message of {size} bytes")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any) -> Any:
    """
    A value of plain data as JSON takes it, rebuilt by `decode`.

    Subclasses of the built-in types become these types (a `Counter` a `dict`, an `IntEnum` an `int`), iterators lose
    their laziness, scalars of numpy become numbers. So a comparison sees values and no methods of the program.

    Raises:
        `TypeError`: If there is something else in it.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__pos__(value)
        return number if -(1 << 63) <= number < 1 << 63 else {"int": hex(number)}
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for kind in _COLLECTIONS:
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in kind.__iter__(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
    if isinstance(value, range):
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    name = type(value).__name__
    if name in _VIEWS and type(value).__module__ == "builtins":
        return {name: [encode(item) for item in value]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    if type(value).__module__ in ("decimal", "fractions") and name in ("Decimal", "Fraction"):
        return {name: str(value)}
    if hasattr(type(value), "__next__"):
        items: list[Any] = []
        for item in value:
            if len(items) == MAX_ITEMS:
                raise TypeError(f"an iterator of more than {MAX_ITEMS} items")
            items.append(encode(item))
        return {"iterator": items}
    raise TypeError(f"a value of type {name}, which is not plain data that the checks can compare")


_COLLECTIONS: tuple[Any, ...] = (set, frozenset, collections.deque)
_VIEWS = ("dict_keys", "dict_values", "dict_items")


def decode(data: Any) -> Any:
    """The value that `encode` made `data` of; `ValueError` or `TypeError` if it made it of none."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("not an encoded value")
    ((kind, content),) = data.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind == "Decimal":
        import decimal

        return decimal.Decimal(content)
    if kind == "Fraction":
        import fractions

        return fractions.Fraction(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    items = [decode(item) for item in content]
    if kind == "iterator":
        return iter(items)
    if kind == "dict_keys":
        return dict.fromkeys(items).keys()
    if kind == "dict_values":
        return dict(enumerate(items)).values()
    if kind == "dict_items":
        return dict(items).items()
    if kind == "range":
        return range(*items)
    if kind in ("tuple", "set", "frozenset"):
        return getattr(builtins, kind)(items)
    if kind == "deque":
        return collections.deque(items)
    raise ValueError(f"not an encoded value: {kind}")


def describe(error: BaseException) -> str:
    """An exception in a line."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:MAX_REASON] if text else type(error).__name__
