"""
Print the subpackages: purpose, size, imports, and allowed imports.

python recipes/subpackages.py          # needs pip install -e ".[dev]" and Python 3.11

A subpackage may import only the layers below its own in pyproject.toml. `lint-imports` enforces this.
"""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import grimp
import tomllib
from rich.console import Console
from rich.table import Table

from hf_phibalance.files import replace_unprintable


PACKAGE = "hf_phibalance"
ROOT = Path(__file__).parent.parent


def layers() -> list[list[str]]:
    """Returns the subpackages of each layer, from the top layer down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in found]


def rows() -> Iterator[tuple[str, ...]]:
    graph = grimp.build_graph(PACKAGE)
    names = list(itertools.chain(*layers()))
    for number, layer in enumerate(layers()):
        allowed = list(itertools.chain(*layers()[number + 1 :]))
        for name in layer:
            folder = ROOT / PACKAGE / name
            files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
            head = folder / "__init__.py" if folder.is_dir() else files[0]
            purpose = " ".join((ast.get_docstring(ast.parse(head.read_text())) or "").split("\n\n")[0].split())
            lines = [len(file.read_text().splitlines()) for file in files]
            imported = [
                other
                for other in names
                if other != name
                and graph.direct_import_exists(
                    importer=f"{PACKAGE}.{name}", imported=f"{PACKAGE}.{other}", as_packages=True
                )
            ]
            sizes = (str(len(files)), str(sum(lines)), str(max(lines)))
            yield name, purpose.split(". ")[0].rstrip("."), *sizes, ", ".join(imported), ", ".join(allowed)


def main() -> None:
    table = Table("subpackage", "what for", "files", "lines", "longest", "imports", "may import", show_lines=True)
    for row in rows():
        table.add_row(*row)
    Console(width=180).print(table)


if __name__ == "__main__":
    replace_unprintable()
    main()
