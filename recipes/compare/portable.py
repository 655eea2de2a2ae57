"""What is left of a balance where a model is served by an engine that knows no selection bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_phibalance.exporting import Folding


FITTED = 30  # batches that the bias is folded by, the last ones of the training
REBALANCE = 3  # iterations; more take layers of low r² too far, at a cost in loss
PLAIN = ("dropped", "folded", "rebalanced")


def served_plainly(
    model: nn.Module, batches: Sequence[Tensor | dict[str, Any]], examine: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    """
    What `examine` finds once the selection bias is gone, as `<variant>_<figure>`: dropped, folded into the routers'
    weights, and folded with the loads evened out afterwards. The model itself stays as it is.

    Args:
        model (`torch.nn.Module`): A patched model with a bias that is not the family's own.
        batches (`Sequence`): Batches of the training, of token ids or of all arguments.
        examine (`Callable`): Measures a model.
    """
    shown = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]
    folding = Folding(model, shown, REBALANCE)
    found = {}
    for variant in PLAIN:
        with folding.variants[variant]():
            found |= {f"{variant}_{name}": value for name, value in examine(model).items()}
    return found
