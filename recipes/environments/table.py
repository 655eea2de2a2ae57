"""
Rewrites the tables of versions (guides/FAMILIES.md) and of tools (guides/TOOLS.md) from their results:

nox -f recipes/environments/noxfile.py && python recipes/environments/table.py
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from hf_phibalance.files import replace_unprintable


ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "recipes" / "guides"
RESULTS = ROOT / "results" / "environments"


def versions_table() -> str:
    """Returns a row per environment, the oldest first."""
    rows = [
        "| transformers | accelerate | peft | trl | families that pass | cannot be had there | core's tests |",
        "|---|---|---|---|---:|---|---|",
    ]
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    for result in sorted(results, key=lambda result: [int(n) for n in result["versions"]["transformers"].split(".")]):
        versions, families, tests = result["versions"], result["families"], result["tests"]
        absent = ", ".join(f"`{name}`" for name in [*families["absent"], *families["refused"]]) or "-"
        passed = len(families["ok"])
        of = f" of {passed + len(families['failed'])}" if families["failed"] else ""
        counts = f"{tests['passed']} passed" + (f", {tests['failed']} failed" if tests["failed"] else "")
        shown = [versions.get(name, "-") for name in ("transformers", "accelerate", "peft", "trl")]
        rows.append(f"| {' | '.join(shown)} | {passed}{of} | {absent} | {counts} |")
    return "\n".join(rows) + "\n" if results else ""


def tools_table() -> str:
    """Returns a row per test of a tool that has measured something."""
    rows = [
        "| tool | transformers | model | trains | batches | effective / declared coefficient | resumed run | `-k` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reports = sorted((RESULTS / "tools").glob("*.xml"))
    noted = {(row["tool"], row["test"]): row for report in reports for row in noted_rows(report)}
    for row in noted.values():
        coefficient = f"{float(row['coefficient']):.7f}" if "coefficient" in row else "-"
        shown = [row["tool"], row["transformers"], f"`{row['model']}`", row["trains"], row["batches"]]
        rows.append(f"| {' | '.join(shown)} | {coefficient} | {row.get('resumed', '-')} | `{row['test']}` |")
    return "\n".join(rows) + "\n" if noted else ""


def noted_rows(report: Path) -> Iterator[dict[str, str]]:
    """Yields the figures that the passed tests recorded in a pytest report."""
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        noted = {str(entry.get("name")): str(entry.get("value")) for entry in test.iter("property")}
        if noted and test.find("failure") is None and test.find("error") is None:
            yield {**noted, "test": str(test.get("name"))}


def main() -> None:
    for name, page, table in (("versions", "FAMILIES.md", versions_table()), ("tools", "TOOLS.md", tools_table())):
        if not table:
            print(f"nothing of {name} in {RESULTS.relative_to(ROOT)}: that table is left as it is")
            continue
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = (GUIDES / page).read_text(encoding="utf-8")
        (GUIDES / page).write_text(
            marked.sub(lambda match, table=table: match[1] + table + match[2], text), encoding="utf-8"
        )


if __name__ == "__main__":
    replace_unprintable()
    main()
