"""
Write the README's table of versions anew, from what the environments have left:

nox -f recipes/environments/noxfile.py -s core && python recipes/environments/table.py
"""

import json
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "environments"
MARKED = re.compile(r"(<!-- versions -->\n).*?(<!-- /versions -->)", re.DOTALL)


def table(results: list[dict]) -> str:
    """A row per environment, the oldest first."""
    rows = [
        "| transformers | accelerate | peft | trl | families that pass | cannot be had there | core's tests |",
        "|---|---|---|---|---:|---|---|",
    ]
    for result in sorted(results, key=lambda result: [int(n) for n in result["versions"]["transformers"].split(".")]):
        versions, families, tests = result["versions"], result["families"], result["tests"]
        absent = ", ".join(f"`{name}`" for name in [*families["absent"], *families["refused"]]) or "-"
        passed = len(families["ok"])
        of = f" of {passed + len(families['failed'])}" if families["failed"] else ""
        counts = f"{tests['passed']} passed" + (f", {tests['failed']} failed" if tests["failed"] else "")
        shown = [versions.get(name, "-") for name in ("transformers", "accelerate", "peft", "trl")]
        rows.append(f"| {' | '.join(shown)} | {passed}{of} | {absent} | {counts} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    if not results:
        raise SystemExit(
            f"nothing in {RESULTS.relative_to(ROOT)}; run: nox -f recipes/environments/noxfile.py -s core"
        )
    README.write_text(MARKED.sub(lambda match: match[1] + table(results) + match[2], README.read_text()))


if __name__ == "__main__":
    main()
