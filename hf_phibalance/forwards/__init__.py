"""
Forwards alone: what a few batches tell of a patched model, and do to it, without a gradient.

| module | what it holds |
|---|---|
| `looking` | forwards in eval mode that leave everything as it was, and who sees the routers meanwhile |
| `calibration` | the running means, and the bias, of a few batches |
| `folding` | a selection bias folded into the routers' weights, for engines that know none |
| `comparison` | loss, loads and changed choices of several variants of a model on the same batches |

Knows balancers, but no trainer, texts or files.
"""

from .calibration import calibrate
from .comparison import Figures, compare
from .folding import Folding, FoldReport, fold
from .looking import Look, evaluating, looking


__all__ = ["Figures", "FoldReport", "Folding", "Look", "calibrate", "compare", "evaluating", "fold", "looking"]
