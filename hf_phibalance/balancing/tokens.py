"""Which tokens of a batch count, and what each of them pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..routers import RouterSite, mask_of


@dataclass
class Tokens:
    """The T = batch x sequence tokens of one forward."""

    mask: Tensor  # (T,) 1.0 for the tokens that count
    rate: Tensor  # (T,) weight of each token in the optimizer step: 1/N, whatever happens to its gradient until then
    batch_size: int = 1
    toll: Tensor | None = None  # flat; what all routers charge, where that is known only after the forward
    trains: bool = True  # False for a forward of an evaluation, which counts apart and never pays
    in_forward: bool = True  # False during a recomputation, which pays but is not counted again
    deferred: bool = False  # its routers ran without autograd, reentrant checkpointing will run them again
    recomputing: bool = False  # and has begun to
    image: Tensor | None = None  # (T,) those that have routers of their own, in models that have such
    weight: Tensor | None = None  # () of one token in `rate`
    _weights: dict[int, Tensor] = field(default_factory=dict)
    _parts: dict[tuple[str, int], Tokens] = field(default_factory=dict)

    def reaching(self, site: RouterSite, routed: int) -> Tokens:
        """Those that router `site` gets, which gets `routed`; all weigh the same, in which router ever."""
        if site.sees_all or (site.modality == "text" and self.image is None):
            return self
        key = (site.modality, routed)
        if key not in self._parts:
            mask = mask_of(site, self.mask, self.image, routed)
            rate = mask if self.weight is None else mask * self.weight
            self._parts[key] = Tokens(mask, rate, toll=self.toll, trains=self.trains)
        return self._parts[key]

    def weights(self, chosen: Tensor) -> Tensor:
        """`mask` of each entry of `chosen (T·k,)`, the experts of one token after those of another."""
        top_k = len(chosen) // len(self.mask)
        if top_k not in self._weights:
            self._weights[top_k] = self.mask.unsqueeze(-1).expand(-1, top_k).reshape(-1)
        return self._weights[top_k]


def count_mask(inputs: Mapping[str, Any], token_mask: str) -> Tensor | None:
    """
    Which tokens of a batch count, `(B, S)` as booleans, or `None` if `inputs` does not tell.

    Raises:
        ValueError: if `token_mask="attention"` and the attention mask is not a `(B, S)` tensor.
    """
    hidden = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if token_mask == "labels":
        labels = inputs.get("labels")
        return None if labels is None else labels != -100
    mask = inputs.get("attention_mask") if token_mask == "attention" else None
    if mask is None:
        return None if hidden is None else torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2] == mask.shape[-1]:
        return _may_see_itself(mask) if hidden is None else _may_see_itself(mask).expand(hidden.shape[:2])
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"token_mask='attention' needs an attention_mask of shape (batch, sequence), got {kind}: the padding "
            "cannot be read off it. Set token_mask='labels' or token_mask='all' in PhiBalanceConfig."
        )
    return (mask if hidden is None else mask[:, -hidden.shape[1] :]) != 0


def _may_see_itself(mask: Tensor) -> Tensor:
    """
    What a mask `(B, 1, S, S)` of packed sequences says of each position: a token attends to itself, padding to nothing.
    Such masks are added to the scores, 0 where attention is allowed; or they are true there.
    """
    own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    return own == 0 if own.is_floating_point() else own != 0
