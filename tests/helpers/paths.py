"""Paths of the project, these helpers and the real data."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent  # for the path of a process started by a test
DATA = ROOT.parent / "shared" / "data"  # real data; tests that read it skip where it is absent


def sources(*folders):
    """Returns the Python files in `folders` of the project, without those of installed environments."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in files if ".nox" not in path.parts)
