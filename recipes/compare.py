"""
Compare balancing methods; the command is that of `recipes/compare/command.py`, which says what it can do:

python recipes/compare.py --help
"""

import sys
import time

from compare.command import main  # of the folder beside this file, which as a package goes before it

from hf_phibalance.files import replace_unprintable


if __name__ == "__main__":
    replace_unprintable()
    began = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - began:.0f} s")
    sys.exit(code)
