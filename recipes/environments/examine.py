"""
What works in the environment that runs this: every family, and the core's tests. Writes what it found as JSON.

python recipes/environments/examine.py NAME results/environments [--families mixtral deepseek_v3 ...] [--quick]

`noxfile.py` runs it in environments made from scratch; `table.py` makes the table in guides/FAMILIES.md of what they wrote.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from hf_phibalance.files import replace_unprintable, versions


ROOT = Path(__file__).resolve().parents[2]
CORE = (
    "tests/test_config.py",
    "tests/test_files.py",
    "tests/maths/test_bias.py",
    "tests/routers/test_contract.py",
    "tests/routers/test_selection.py",
    "tests/balancing/test_state.py",
    "tests/balancing/test_hostile_states.py",
    "tests/balancing/test_copies.py",
    "tests/models/test_auto.py",
    "tests/training/test_resume.py",
    "tests/training/test_checkpoints.py",
    "tests/training/test_verify.py",
)
LONGER = (  # left out by --quick
    "tests/balancing/test_any_sequence.py",
    "tests/balancing/test_interruptions.py",
    "tests/hub/test_run.py",
)


def examine_families(names: list[str]) -> dict[str, list[str]]:
    """Returns the families by outcome: `"ok"`, `"failed"`, `"absent"` (this version cannot build or train them), `"refused"`."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
    import version_table

    version_table.prepare()
    found: dict[str, list[str]] = {"ok": [], "failed": [], "absent": [], "refused": []}
    for model_type in names or version_table.MODEL_TYPES:
        outcome = version_table.outcome(version_table.row(model_type))
        found[outcome].append(model_type)
        print(f"{model_type}: {outcome}", flush=True)
    return found


def run_tests(files: Sequence[str]) -> dict[str, int]:
    """Returns how many of the core's tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-n", "auto", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, check=False)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the environment")
    parser.add_argument("folder", type=Path, help="for the result, as NAME.json")
    parser.add_argument(
        "--families", nargs="*", default=[], help="model types; all that this version has unless given"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the tests that take long")
    args = parser.parse_args()
    result = {
        "versions": versions(),
        "families": examine_families(args.families),
        "tests": run_tests(CORE if args.quick else CORE + LONGER),
    }
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["tests"]))
    return int(bool(result["families"]["failed"] or result["tests"]["failed"] or not result["tests"]["passed"]))


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
