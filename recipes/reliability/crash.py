"""
Kills training runs and resumes them: do they end as the run that nobody touched, bit for bit? What is killed when, and what
is compared, is said in the folder of the same name.

Usage:

    python recipes/reliability/crash.py
    python recipes/reliability/crash.py --kills 5 --moments checkpoint state --ranks 2

Linux, no network, about half an hour on 2 CPU cores. Exits with 1 if anything was lost or differs.
"""

import os
import sys


os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork

from crash import main  # of the folder beside this file, which as a package goes before it

from hf_phibalance.files import replace_unprintable


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
