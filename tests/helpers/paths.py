"""Paths of the project, these helpers and the real data."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent  # for the path of a process started by a test
DATA = ROOT.parent / "shared" / "data"  # real data; tests that read it skip where it is absent
