"""
Lets patched models live: anything in any order, while a plain model says what should hold.

Patching, patching anew, unpatching; adapters that come, change, are switched off, merged or taken out; copies and pickles;
other types and back; saving and loading; steps with an evaluation, a generation, a serving thread, an error or a Ctrl-C in
the middle; `trainer.train()` twice; another patched model beside it. After each, the gradients and the duals are those of
the reference, an unpatched model has nothing left on it, and other models are as they were. The state machine is
`tests/helpers/life.py`; the ordinary tests run a few examples of it. A failure is shown as the shortest story that fails.

Usage:

    python recipes/reliability/lifecycle.py
    python recipes/reliability/lifecycle.py --examples 500 --steps 30 --seed 7 --model_types mixtral

CPU, no network; 100 examples of 20 events take about ten minutes of one core, for each model type.
"""

import argparse
import collections
import os
import sys
import time
from pathlib import Path

from hf_phibalance.files import replace_unprintable, versions


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))


def main(args):
    from hypothesis import HealthCheck, seed, settings
    from hypothesis.stateful import run_state_machine_as_test
    from life import SIZES, Life
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if unknown := set(args.model_types) - set(SIZES):
        raise SystemExit(f"--model_types: {sorted(unknown)} are not among {sorted(SIZES)}.")
    wanted = settings(
        max_examples=args.examples,
        stateful_step_count=args.steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for model_type in args.model_types:
        tried, started = collections.Counter(), time.perf_counter()
        machine = type(f"Life_{model_type}", (Life,), {"model_type": model_type, "tried": tried})
        run_state_machine_as_test(seed(args.seed)(machine), settings=wanted)
        seconds = time.perf_counter() - started
        print(f"{model_type}: {args.examples} examples, {sum(tried.values())} steps, {seconds:.0f} s, no difference")
        print("  " + ", ".join(f"{name} {count}" for name, count in sorted(tried.items())))
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_types", nargs="+", default=["mixtral", "deepseek_v3"])
    parser.add_argument("--examples", type=int, default=100, help="stories (default: 100)")
    parser.add_argument("--steps", type=int, default=20, help="at most so many events in each (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    replace_unprintable()
    main(make_parser().parse_args())
