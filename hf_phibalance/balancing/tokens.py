"""Which tokens of a batch count, and what each of them pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..routers import RouterSite, mask_of


@dataclass(frozen=True)
class Counted:
    """Which of the T = batch x sequence tokens of a batch count."""

    entries: Tensor  # (T, k) 1.0 for the tokens that count, once for each expert that is chosen
    number: Tensor  # () of tokens that count
    batch_size: int

    @classmethod
    def of(cls, mask_BS: Tensor, top_k: int) -> Counted:
        """Those in `mask_BS`, booleans, for routers that choose `top_k` experts per token."""
        entries = mask_BS.reshape(-1, 1).expand(-1, top_k)
        entries = entries.to(torch.float32, memory_format=torch.contiguous_format)
        return cls(entries, mask_BS.sum(dtype=torch.float32), len(mask_BS))

    @property
    def mask(self) -> Tensor:
        """1.0 for the tokens that count, `(T,)`."""
        return self.entries[:, 0]


class Announced:
    """What has been counted of the batches that a step was announced with, for the forwards of the same tensors."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, tuple[int, torch.Size | None], Counted]] = {}

    def keep(self, inputs: Mapping[str, Any], token_mask: str, counted: Counted) -> None:
        """Takes note of what was `counted` of `inputs`, arguments of the model by name."""
        source = _source(inputs, token_mask)
        if isinstance(source, Tensor) and not source.is_inference():  # else nothing tells whether it has changed
            self._kept[id(source)] = (source, (source._version, _shape(inputs)), counted)

    def find(self, inputs: Mapping[str, Any], token_mask: str) -> Counted | None:
        """What was counted of `inputs`; `None` if that was of other tensors, or if they have changed since."""
        source = _source(inputs, token_mask)
        if torch.compiler.is_compiling() or id(source) not in self._kept:
            return None
        kept, state, counted = self._kept[id(source)]
        return counted if state == (kept._version, _shape(inputs)) else None


def _source(inputs: Mapping[str, Any], token_mask: str) -> Any:
    """What says which tokens of `inputs` count, if anything does."""
    return inputs.get({"labels": "labels", "attention": "attention_mask"}.get(token_mask, ""))


def _shape(inputs: Mapping[str, Any]) -> torch.Size | None:
    """Of the sequences in `inputs`, `(B, S)`."""
    hidden = _hidden(inputs)
    return None if hidden is None else hidden.shape[:2]


def _hidden(inputs: Mapping[str, Any]) -> Tensor | None:
    return next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)


@dataclass
class Tokens:
    """The T = batch x sequence tokens of one forward."""

    mask: Tensor  # (T,) 1.0 for the tokens that count
    rate: Tensor  # (T,) `mask` over the `divisor`
    batch_size: int = 1
    toll: Tensor | None = None  # flat; what all routers charge, where that is known only after the forward
    trains: bool = True  # False for a forward of an evaluation, which counts apart and never pays
    in_forward: bool = True  # False during a recomputation, which pays but is not counted again
    deferred: bool = False  # its routers ran without autograd, reentrant checkpointing will run them again
    recomputing: bool = False  # and has begun to
    image: Tensor | None = None  # (T,) those that have routers of their own, in models that have such
    divisor: Tensor | None = None  # () of a token's gradient: N, whatever happens to it until the optimizer gets it
    _weights: dict[int, Tensor] = field(default_factory=dict)
    _parts: dict[tuple[str, int], Tokens] = field(default_factory=dict)

    @classmethod
    def of(cls, counted: Counted, divisor: Tensor | None = None, **kwargs: Any) -> Tokens:
        """The tokens that were `counted`, each of whose gradients is divided by `divisor`."""
        entries, mask = counted.entries, counted.mask
        rate = mask if divisor is None else mask / divisor
        weights = {entries.shape[1]: entries.view(-1)}
        return cls(mask, rate, counted.batch_size, divisor=divisor, _weights=weights, **kwargs)

    def reaching(self, site: RouterSite, routed: int) -> Tokens:
        """Those that router `site` gets, which gets `routed`; all weigh the same, in which router ever."""
        if site.sees_all or (site.modality == "text" and self.image is None):
            return self
        key = (site.modality, routed)
        if key not in self._parts:
            mask = mask_of(site, self.mask, self.image, routed)
            rate = mask if self.divisor is None else mask / self.divisor
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
    hidden = _hidden(inputs)
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
