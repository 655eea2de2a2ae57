"""Front doors whose names are imported when they are first asked for."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_door(names: dict[str, Any], where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` of a package.

    Args:
        names (`dict`): its `globals()`, which keep what has been imported.
        where (`Mapping[str, str]`): its public names, each with the module inside it that has it.
    """
    package = names["__name__"]

    def getattribute(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        names[name] = getattr(importlib.import_module(f".{where[name]}", package), name)
        return names[name]

    return getattribute, lambda: sorted({*names, *where})
