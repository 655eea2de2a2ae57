"""
Layouts: does one optimizer step receive the declared coefficient, and is each token counted once, when transformers spreads
the model over 2 and 4 real gloo processes (FSDP2, HSDP, tensor and expert parallelism, and both together)?

Usage:

    python recipes/reliability/layouts.py
    python recipes/reliability/layouts.py --model_types mixtral --ranks 2 --json layouts.json

A few minutes on 2 CPU cores, no network. Exits with 1 if a layout is out of bounds or fails. Models with a norm per head, such
as Qwen3-MoE, are: under tensor parallelism transformers 5.24 leaves those norms a part of their gradient, patched or not
(residual 6e-4; the projection stays 1.0000004).
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from invariance import LAYOUTS, in_ranks, measure_layouts, save_models
from invariance.report import environment

from hf_phibalance.files import replace_unprintable


BOUND = 1e-4
TRAINERS = ("raw loop", "Trainer")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the coefficient of models that are spread over processes.")
    parser.add_argument("--model_types", nargs="+", default=["mixtral", "deepseek_v3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], choices=[2, 4])
    parser.add_argument("--json", metavar="FILE", help="write every figure there as well")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), args.model_types)
        for ranks in args.ranks:
            names = [layout.name for layout in LAYOUTS if layout.ranks == ranks]
            for model_type in args.model_types:
                results += in_ranks(measure_layouts, ranks, names, TRAINERS, folder, model_type)[0]
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment().items()) + "\n")
    print("| layout | trainer | model | effective / declared | residual | tokens counted / there |")
    print("|---|---|---|--:|--:|--:|")
    for r in results:
        print(f"| {r.layout} | {r.trainer} | {r.model_type} | {r.ratio:.7f} | {r.residual:.1e} | {r.counted:g} |")
    if args.json:
        rows = [dataclasses.asdict(result) for result in results]
        Path(args.json).write_text(json.dumps({"environment": environment(), "layouts": rows}, indent=1))
    failed = [r for r in results if abs(r.ratio - 1) > BOUND or r.residual > BOUND or r.counted != 1]
    for result in failed:
        print(f"OUT OF BOUNDS: {result}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
