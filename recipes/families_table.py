"""Writes the table of supported model families into recipes/guides/FAMILIES.md, between its markers.

python recipes/families_table.py          # rewrite
python recipes/families_table.py --check  # exit 1 if the page is not current
"""

import argparse
import re
import sys
from itertools import groupby
from pathlib import Path

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable


PAGE = Path(__file__).parent / "guides" / "FAMILIES.md"
MARKERS = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)


def table() -> str:
    """Returns the families as a Markdown table, similar ones on one line."""
    families = [(family, 0) for family in phb.supported_families().values()]
    families += [(family, 1) for family in phb.supported_families(images=True).values()]

    def kind(entry):
        family, _ = entry
        return (bool(family.refused), family.scoring, family.selection_bias, family.refused or "")

    lines = ["| causal LMs | models that read images | routing probabilities | dual bias |", "|---|---|---|---|"]
    for (_, scoring, bias, refused), alike in groupby(sorted(families, key=kind), key=kind):
        names: tuple[list[str], list[str]] = ([], [])
        for family, column in alike:
            names[column].append(f"`{family.model_type}`")
        scoring = {"probs": "softmax, returned as such"}.get(scoring, scoring)
        said = f"refused: {refused} | " if refused else f"{scoring} | {bias}"
        lines.append(f"| {', '.join(names[0])} | {', '.join(names[1])} | {said} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    return MARKERS.sub(lambda match: match[1] + table() + match[2], text)


if __name__ == "__main__":
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    current = PAGE.read_text(encoding="utf-8")
    if parser.parse_args().check:
        sys.exit(current != updated(current))
    PAGE.write_text(updated(current), encoding="utf-8")
