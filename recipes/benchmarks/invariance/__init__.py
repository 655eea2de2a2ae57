"""
Invariance matrix: does one optimizer step receive the declared coefficient, however the step is carried out?

16 padded rows of very different length are one optimizer step. They are trained on in every combination of

    trainer            Trainer, SFTTrainer, raw loop
    checkpointing      none, non-reentrant, reentrant
    precision          fp32, bf16 autocast
    accumulation       1, 2, 4, 8 micro-batches of unequal numbers of rows and tokens
    ranks              1, and 2 real gloo processes

and for each the gradient that reaches the optimizer (before clipping) is compared with the definition: the autograd
gradient g_ref of Σ_layers mean_tokens ⟨q, p⟩, written out naively on the unpatched model, in fp32, in one forward over
all rows. With g the gradient of the balanced model and g_0 that of the plain one,

    effective / declared = ⟨g - g_0, g_ref⟩ / (coef ⟨g_ref, g_ref⟩)        what the table shows, 1 if exact
    residual             = |g - g_0 - coef g_ref| / |coef g_ref|           0 if every component is exact

The last rows show the same projection, over the router parameters, for the model's own auxiliary loss under the stock
`Trainer`: its gradient on the same split over that of one forward over all rows.

| module | what it is for |
|---|---|
| `cells` | the matrix |
| `inputs` | model, rows, micro-batches |
| `definition` | the gradient by definition |
| `steps`, `ranks` | the step carried out by each trainer; processes that do so together |
| `measurement`, `report` | a cell against the definition; table and summary |
| `layouts` | the same where the model itself is spread over the ranks |
| `command` | the command line |
"""

from .cells import ACCUMULATION, CHECKPOINTING, PRECISIONS, TRAINERS, Cell, all_cells
from .command import main
from .definition import flat_gradient, reference
from .inputs import COEF, build_model, build_rows, collate, deal
from .layouts import LAYOUTS, Layout, load_spread, measure_layouts, save_models
from .measurement import RESIDUAL_BOUND, Result, measure, prepare_process
from .ranks import in_ranks
from .report import markdown
from .steps import Recorder, set_checkpointing


__all__ = [
    "ACCUMULATION",
    "CHECKPOINTING",
    "COEF",
    "LAYOUTS",
    "PRECISIONS",
    "RESIDUAL_BOUND",
    "TRAINERS",
    "Cell",
    "Layout",
    "Recorder",
    "Result",
    "all_cells",
    "build_model",
    "build_rows",
    "collate",
    "deal",
    "flat_gradient",
    "in_ranks",
    "load_spread",
    "main",
    "markdown",
    "measure",
    "measure_layouts",
    "prepare_process",
    "reference",
    "save_models",
    "set_checkpointing",
]
