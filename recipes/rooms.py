"""
Print the rooms of the package: what each is for, its size, what it may import, and what it does import.

python recipes/rooms.py            # needs pip install -e ".[dev]" and Python 3.11

What is allowed are the layers in pyproject.toml, which `lint-imports` holds the package to; a room is entered by its
`__init__.py` only. What is imported is read off the code.
"""

import ast
from pathlib import Path

import grimp
import tomllib
from rich.console import Console
from rich.table import Table

from hf_phibalance.files import replace_unprintable


PACKAGE = "hf_phibalance"
ROOT = Path(__file__).parent.parent


def layers() -> list[list[str]]:
    """The rooms from the top down, those of one layer side by side."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in found]


def allowed(room: str) -> list[str]:
    """Rooms that `room` may import: those of all layers below its own."""
    found = layers()
    own = next(number for number, layer in enumerate(found) if room in layer)
    return [below for layer in found[own + 1 :] for below in layer]


def files_of(room: str) -> list[Path]:
    folder = ROOT / PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def purpose(room: str) -> str:
    """First sentence of its docstring."""
    folder = ROOT / PACKAGE / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py" if folder.is_dir() else files_of(room)[0]).read_text()))
    return " ".join((text or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def imported(graph: grimp.ImportGraph, room: str) -> list[str]:
    """Rooms that `room` does import."""
    rooms = [other for layer in layers() for other in layer if other != room]
    here = f"{PACKAGE}.{room}"
    return [
        other
        for other in rooms
        if graph.direct_import_exists(importer=here, imported=f"{PACKAGE}.{other}", as_packages=True)
    ]


def rows() -> list[tuple[str, ...]]:
    graph = grimp.build_graph(PACKAGE)
    found = []
    for room in (room for layer in layers() for room in layer):
        lines = [len(file.read_text().splitlines()) for file in files_of(room)]
        found.append(
            (
                room,
                purpose(room),
                str(len(lines)),
                str(sum(lines)),
                str(max(lines)),
                ", ".join(imported(graph, room)),
                ", ".join(allowed(room)),
            )
        )
    return found


def main() -> None:
    table = Table("room", "what for", "files", "lines", "longest", "imports", "may import", show_lines=True)
    for row in rows():
        table.add_row(*row)
    Console(width=180).print(table)


if __name__ == "__main__":
    replace_unprintable()
    main()
