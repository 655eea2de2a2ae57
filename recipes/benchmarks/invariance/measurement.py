"""What a cell shows: the gradient that its optimizer got, against the definition."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .cells import Cell
from .definition import reference
from .inputs import COEF
from .steps import optimizer_gradient


RATIO_BOUND = {"fp32": 1e-4, "bf16": 1e-2}
RESIDUAL_BOUND = {"fp32": 1e-4, "bf16": 1e-2}


@dataclass(frozen=True)
class Result:
    """What a cell showed: effective over declared coefficient, and the relative residual."""

    cell: Cell
    ratio: float
    residual: float

    @property
    def ok(self) -> bool:
        if self.cell.balancing != "phi":
            return True
        precision = self.cell.precision
        return abs(self.ratio - 1) <= RATIO_BOUND[precision] and self.residual <= RESIDUAL_BOUND[precision]


@functools.cache
def plain_gradient(cell: Cell, model_type: str) -> Tensor:
    return optimizer_gradient(cell, model_type)


def measure(cell: Cell, model_type: str) -> Result:
    """Projection and residual of one cell, in the present process (group)."""
    expected = reference(model_type, cell.token_mask)
    plain = plain_gradient(dataclasses.replace(cell, balancing="none", token_mask="attention"), model_type)
    added = optimizer_gradient(cell, model_type) - plain
    if cell.balancing == "phi":
        declared = COEF * expected.phi
    else:
        added, declared = added[expected.is_router], expected.built_in[expected.is_router]
    ratio = float(added @ declared / (declared @ declared))
    return Result(cell, ratio, float((added - declared).norm() / declared.norm()))


def measure_all(cells: Iterable[Cell], model_type: str) -> list[Result]:
    """Measures `cells`, all of the same number of ranks, in the present process (group)."""
    from tqdm.auto import tqdm

    prepare_process()
    cells = list(cells)
    rank = int(os.environ.get("RANK", 0))
    bar = tqdm(cells, desc=f"{cells[0].ranks} rank(s)", unit="cell", disable=rank != 0)
    return [measure(cell, model_type) for cell in bar]


def prepare_process() -> None:
    """Silences the trainers, whose notices would drown the progress bar, and makes the start of each quick."""
    import trl.trainer.sft_trainer  # noqa: F401  # before the freeze
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    gc.freeze()  # every trainer begins with a garbage collection, which would take most of the time
