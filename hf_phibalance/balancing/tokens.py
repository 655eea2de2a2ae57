"""Finds which tokens of a forward count, and the sequence of each. Shapes: B rows, S positions, T = B·S tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..routers import RouterSite, mask_of


class Tokens:
    """
    The tokens of one forward.

    Args:
        mask_BS (`torch.Tensor` of shape `(B, S)`): whether each token counts.
        image_T (`torch.Tensor` of shape `(T,)`, *optional*): image tokens, in models that have other routers for them.
        sequence_T (`torch.Tensor` of shape `(T,)`, *optional*): the sequence of each token, if rows are packed.
    """

    def __init__(self, mask_BS: Tensor, image_T: Tensor | None = None, sequence_T: Tensor | None = None) -> None:
        self.rows = len(mask_BS)
        self.mask = mask_BS.reshape(-1).to(torch.float32)  # (T,) 1 for a token that counts, 0 for padding
        self.count = self.mask.sum()  # ()
        self.image, self.sequence = image_T, sequence_T
        self._parts: dict[tuple[str, int], Tensor] = {}
        self._entries: dict[tuple[int, int], Tensor] = {}

    def mask_at(self, site: RouterSite, routed: int) -> Tensor:
        """Returns the mask `(routed,)` of the vectors that reach a router: all tokens, or those of its modality."""
        if site.sees_all or (site.modality == "text" and self.image is None):
            return self.mask
        key = (site.modality, routed)
        if key not in self._parts:
            self._parts[key] = mask_of(site, self.mask, self.image, routed)
        return self._parts[key]

    def entries_of(self, mask: Tensor, top_k: int) -> Tensor:
        """Returns `mask (T,)` repeated for each selected expert, `(T·k,)`."""
        key = (id(mask), top_k)
        if key not in self._entries:
            self._entries[key] = mask.unsqueeze(-1).expand(-1, top_k).reshape(-1)
        return self._entries[key]

    def sequences(self) -> Tensor:
        """Returns the sequence of each token, `(T,)`: its row, unless rows are packed."""
        if self.sequence is None:
            rows = torch.arange(self.rows, device=self.mask.device)
            self.sequence = rows.repeat_interleave(len(self.mask) // self.rows)
        return self.sequence


def hidden_shape(inputs: Mapping[str, Any]) -> torch.Size | None:
    """Returns (B, S) of the sequences in `inputs`; `None` if there are none."""
    hidden = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    return None if hidden is None else hidden.shape[:2]


def count_mask(inputs: Mapping[str, Any], token_mask: str, pad_token_id: int | None = None) -> Tensor | None:
    """
    Returns the token mask of a batch, `(B, S)`: True for tokens that count. `None` if it cannot be known from `inputs`.

    Args:
        inputs (`Mapping`): arguments of the model by name.
        token_mask (`str`): `"attention"`, `"labels"` or `"all"`.
        pad_token_id (`int`, *optional*): of the model; packed rows may end with it.

    Raises:
        ValueError: if `token_mask="attention"` and the attention mask cannot be read.
    """
    shape = hidden_shape(inputs)
    if token_mask == "labels":
        labels = inputs.get("labels")
        return None if labels is None else labels != -100
    if shape is None:
        return None
    mask = inputs.get("attention_mask") if token_mask == "attention" else None
    if isinstance(mask, Mapping):  # one mask per kind of attention; a token sees itself in each
        mask = next((part for part in mask.values() if isinstance(part, Tensor)), None)
    if mask is None:
        everything = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        mask_BS = torch.ones(shape, dtype=torch.bool, device=everything.device)
        return mask_BS if token_mask == "all" else mask_BS & ~_filling(inputs, shape, pad_token_id, mask_BS)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2] == mask.shape[-1]:
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)  # padding does not see itself
        return (own == 0 if own.is_floating_point() else own != 0).expand(shape)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2] == shape[1]:  # with a cache of fixed length
        seen = mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0] != 0  # padding sees nothing
        return seen.any(-1).expand(shape)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"token_mask='attention' needs an attention_mask of shape (batch, sequence), got {kind}: the padding "
            "cannot be read off it. Set token_mask='labels' or token_mask='all' in PhiBalanceConfig."
        )
    return mask[:, -shape[1] :] != 0


def _filling(inputs: Mapping[str, Any], shape: torch.Size, pad_token_id: int | None, mask_BS: Tensor) -> Tensor:
    """Finds padding at the end of packed rows without an attention mask: position 0, not followed by position 1."""
    position = _positions(inputs)
    ids = inputs.get("input_ids")
    if position is None or ids is None or pad_token_id is None or shape[1] == 1:
        return torch.zeros_like(mask_BS)
    after = torch.nn.functional.pad(position[:, 1:], (0, 1))
    return ((position == 0) & (after != 1) & (ids == pad_token_id)).expand(shape)


def count_padding(ids_BS: Tensor, mask_BS: Tensor, pad_token_id: int) -> Tensor:
    """Counts padding among the tokens that count, `()`: two or more pad tokens at an end of a row. A single one may end a text."""
    is_pad = ((ids_BS == pad_token_id) & mask_BS).long()
    runs = torch.stack([is_pad.cumprod(-1).sum(-1), is_pad.flip(-1).cumprod(-1).sum(-1)])
    return (runs * (runs > 1)).sum()


def _positions(inputs: Mapping[str, Any]) -> Tensor | None:
    position = inputs.get("position_ids")
    return position if isinstance(position, Tensor) and position.ndim == 2 else None


def packed_sequences(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the sequence of each token in packed rows, `(T,)`, by `cu_seq_lens_q` or `position_ids`; `None` without them."""
    shape = hidden_shape(inputs)
    if shape is None:
        return None
    position, bounds = _positions(inputs), inputs.get("cu_seq_lens_q")
    if bounds is not None and position is None:
        place = torch.arange(shape.numel(), device=bounds.device, dtype=bounds.dtype)
        return torch.searchsorted(bounds, place, right=True) - 1
    if position is None:
        return None
    starts = (position == 0).expand(shape).clone()
    starts[:, 0] = True
    return starts.reshape(-1).cumsum(0) - 1


def announced_masks(batch: Any, token_mask: str, pad_token_id: int | None = None) -> list[Tensor]:
    """
    Returns the token masks of a trainer's micro-batch: a batch of the model's arguments, pairs in columns such as
    `chosen_input_ids`, or a dict or list of batches. Empty if they cannot be known.
    """
    if isinstance(batch, (list, tuple)):
        return [mask for part in batch for mask in announced_masks(part, token_mask, pad_token_id)]
    if not isinstance(batch, Mapping):
        return []
    mask = count_mask(batch, token_mask, pad_token_id)
    if mask is not None:
        return [mask]
    prefixes = [name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")]
    parts = [{n.removeprefix(p): v for n, v in batch.items() if n.startswith(p)} for p in prefixes]
    masks = [mask for part in parts if (mask := count_mask(part, token_mask, pad_token_id)) is not None]
    if masks:
        return masks if len(masks) == len(parts) else []
    inside = [part for part in batch.values() if isinstance(part, (Mapping, list))]
    nested = [announced_masks(part, token_mask, pad_token_id) for part in inside]
    return [mask for masks in nested for mask in masks] if all(nested) else []
