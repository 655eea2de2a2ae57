"""
Invariance matrix: does one optimizer step receive the declared coefficient, however the step is carried out? What is
measured, and against what, is said in the folder of the same name.

Usage:

    python recipes/benchmarks/invariance.py
    python recipes/benchmarks/invariance.py --model_type qwen3_moe --json invariance.json

Takes one and a half minutes on 2 CPU cores, needs no network. Exits with 1 if a cell is out of bounds.
"""

import sys

from invariance import main  # of the folder beside this file, which as a package goes before it

from hf_phibalance.files import replace_unprintable


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
