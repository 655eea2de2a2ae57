"""Writes the table of supported model families into README.md, between its markers.

python recipes/families_table.py          # rewrite
python recipes/families_table.py --check  # exit 1 if README.md is not current
"""

import argparse
import re
import sys
from itertools import groupby
from pathlib import Path

import hf_phibalance as phb


README = Path(__file__).parent.parent / "README.md"
MARKERS = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)


def table() -> str:
    """Families as markdown, one line for those that are alike."""
    families = phb.supported_families().values()

    def kind(family):
        return (bool(family.refused), family.scoring, family.selection_bias)

    lines = ["| model types | routing probabilities | dual bias |", "|---|---|---|"]
    for (refused, scoring, bias), alike in groupby(sorted(families, key=kind), key=kind):
        alike = list(alike)
        names = ", ".join(f"`{family.model_type}`" for family in alike)
        if refused:
            lines.append(f"| {names} | refused: {alike[0].refused} | |")
        else:
            scoring = {"probs": "softmax, returned as such"}.get(scoring, scoring)
            lines.append(f"| {names} | {scoring} | {bias} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    return MARKERS.sub(lambda match: match[1] + table() + match[2], text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    current = README.read_text()
    if parser.parse_args().check:
        sys.exit(current != updated(current))
    README.write_text(updated(current))
