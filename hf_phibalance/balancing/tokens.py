"""Finds which tokens of a forward count, and the sequence of each. Shapes: B rows, S positions, T = B·S tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..routers import RouterSite, mask_of


class Tokens:
    """
    The tokens of one forward. `mask_BS (B, S)`: whether each token counts. `image_T (T,)`: image tokens, in models that have
    other routers for them. `sequence_T (T,)`: the sequence of each token, if rows are packed.
    """

    def __init__(self, mask_BS: Tensor, image_T: Tensor | None = None, sequence_T: Tensor | None = None) -> None:
        self.rows = len(mask_BS)
        self.mask = mask_BS.reshape(-1).to(torch.float32)  # (T,) 1 for a token that counts, 0 for padding
        self.count = self.mask.sum()  # ()
        self.image, self.sequence = image_T, sequence_T
        self._cache: dict[tuple, Tensor] = {}  # most routers of a model ask for the same

    def mask_at(self, site: RouterSite, routed: int) -> Tensor:
        """Returns the mask `(routed,)` of the vectors that reach a router: all tokens, or those of its modality."""
        if site.sees_all or (site.modality == "text" and self.image is None):
            return self.mask
        key = (site.modality, routed)
        if key not in self._cache:
            self._cache[key] = mask_of(site, self.mask, self.image, routed)
        return self._cache[key]

    def repeated(self, mask: Tensor, top_k: int) -> Tensor:
        """Returns `mask (T,)` repeated for each selected expert, `(T·k,)`."""
        key = (id(mask), top_k)
        if key not in self._cache:
            self._cache[key] = mask.unsqueeze(-1).expand(-1, top_k).reshape(-1)
        return self._cache[key]

    def sequences(self) -> Tensor:
        """Returns the sequence of each token, `(T,)`: its row, unless rows are packed."""
        if self.sequence is None:
            rows = torch.arange(self.rows, device=self.mask.device)
            self.sequence = rows.repeat_interleave(len(self.mask) // self.rows)
        return self.sequence


def hidden_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns `input_ids (B, S)` or `inputs_embeds (B, S, H)`; `None` if there are none."""
    return next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)


def count_mask(inputs: Mapping[str, Any], token_mask: str, pad_token_id: int | None = None) -> Tensor | None:
    """
    Returns the token mask of a batch, `(B, S)`: True for tokens that count. `None` if it cannot be known from `inputs`.

    Args:
        inputs (`Mapping`): arguments of the model by name.
        token_mask (`str`): `"attention"`, `"labels"` or `"all"`.
        pad_token_id (`int`, *optional*): of the model; packed rows may end with it.
    """
    if token_mask == "labels":
        labels = inputs.get("labels")
        return None if labels is None else labels != -100
    hidden = hidden_of(inputs)
    if hidden is None:
        return None
    shape = hidden.shape[:2]
    mask = inputs.get("attention_mask") if token_mask == "attention" else None
    if isinstance(mask, Mapping):  # one mask per kind of attention; a token sees itself in each
        mask = next((part for part in mask.values() if isinstance(part, Tensor)), None)
    if mask is None:
        mask_BS = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        return mask_BS if token_mask == "all" else mask_BS & ~_packed_padding(inputs, mask_BS, pad_token_id)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -shape[1] :] != 0
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0] != 0
        if mask.shape[-2] == mask.shape[-1]:
            return seen.diagonal(dim1=-2, dim2=-1).expand(shape)  # padding does not see itself
        if mask.shape[-2] == shape[1]:  # with a cache of fixed length
            return seen.any(-1).expand(shape)  # padding sees nothing
    kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    raise ValueError(
        f"token_mask='attention' needs an attention_mask of shape (batch, sequence), got {kind}: the padding cannot be read "
        "off it. Set token_mask='labels' or token_mask='all' in PhiBalanceConfig."
    )


def _packed_padding(inputs: Mapping[str, Any], mask_BS: Tensor, pad_token_id: int | None) -> Tensor:
    """Finds padding at the end of packed rows without an attention mask: position 0, not followed by position 1."""
    position, ids = _positions(inputs), inputs.get("input_ids")
    if position is None or ids is None or pad_token_id is None or mask_BS.shape[1] == 1:
        return torch.zeros_like(mask_BS)
    after = torch.nn.functional.pad(position[:, 1:], (0, 1))
    return ((position == 0) & (after != 1) & (ids == pad_token_id)).expand(mask_BS.shape)


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
    hidden, position, bounds = hidden_of(inputs), _positions(inputs), inputs.get("cu_seq_lens_q")
    if hidden is None:
        return None
    shape = hidden.shape[:2]
    if position is not None:
        starts = (position == 0).expand(shape).clone()
        starts[:, 0] = True
        return starts.reshape(-1).cumsum(0) - 1
    if bounds is None:
        return None
    place = torch.arange(shape.numel(), device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds, place, right=True) - 1


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


def virtual_tokens(model: nn.Module) -> int | None:
    """Returns how many tokens PEFT's prompt learning puts in front of each row of `model`; `None` without prompt learning."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    if config is None or not getattr(config, "is_prompt_learning", False):
        return None
    return 0 if str(config.peft_type).endswith("PREFIX_TUNING") else int(config.num_virtual_tokens)


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuses prompt learning where the base model is run alone. Raises `ValueError`."""
    if virtual_tokens(model) is not None:
        raise ValueError(
            f"the adapter of {type(model).__name__} puts virtual tokens in front of every row, which this would leave out. Call it "
            "on the base model (model.get_base_model()), or train another kind of adapter, e.g. phb.lora_config(model)."
        )
