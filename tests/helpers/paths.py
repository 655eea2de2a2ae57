"""Where the project and the real data are."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"  # real data; tests that read it skip where it is absent
