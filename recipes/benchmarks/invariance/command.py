"""The command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import torch

import hf_phibalance as phb

from .cells import RANKS, all_cells
from .inputs import build_model
from .measurement import measure_all
from .ranks import in_ranks
from .report import environment, markdown, summary


def unsuitable(model_type: str) -> str | None:
    """Why a model type cannot be measured here, `None` if it can."""
    family = phb.supported_families().get(model_type)
    if family is None:
        return "it declares no router logits"
    if family.refused or family.scoring not in ("softmax", "sigmoid"):
        return family.refused or f"its routing probabilities ({family.scoring}) are not written out here"
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in build_model(model_type).parameters())
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be built from the fields in FIELDS ({error})"
    return None if size < 10**6 else f"with the fields in FIELDS it still has {size:,} parameters"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures that the price gradient is invariant to how a step is run.")
    parser.add_argument("--model_type", default="mixtral", help="a causal-LM model type of transformers")
    parser.add_argument("--json", metavar="FILE", help="write every cell there as well")
    args = parser.parse_args()
    if (problem := unsuitable(args.model_type)) is not None:
        parser.error(f"--model_type {args.model_type}: {problem}; choose another one, such as mixtral")
    torch.set_num_threads(1)
    cells = all_cells()
    if not hasattr(build_model(args.model_type).config, "router_aux_loss_coef"):
        cells = [cell for cell in cells if cell.balancing == "phi"]
    results = measure_all([cell for cell in cells if cell.ranks == 1], args.model_type)
    for ranks in RANKS[1:]:
        results += in_ranks(measure_all, ranks, [cell for cell in cells if cell.ranks == ranks], args.model_type)[0]
    print(f"\n{args.model_type}; columns: ranks × accumulation steps; ", end="")
    print(", ".join(f"{name} {value}" for name, value in environment().items()), "\n")
    print(markdown(results), "\n", summary(results), sep="\n")
    if args.json:
        rows = [dataclasses.asdict(r.cell) | {"ratio": r.ratio, "residual": r.residual} for r in results]
        with open(args.json, "w") as file:
            json.dump({"model_type": args.model_type, "environment": environment(), "cells": rows}, file, indent=1)
    failed = [r for r in results if not r.ok]
    for result in failed:
        print(f"OUT OF BOUNDS: {result}", file=sys.stderr)
    return bool(failed)
