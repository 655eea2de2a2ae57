"""Variants of a model on the same batches: loss, loads, and the choices that differ from those of the first.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..balancing import Batch, Look, Measurement, looking
from ..routers import predicts_tokens


Variant = Callable[[], AbstractContextManager]


def compare(
    model: nn.Module, batches: Iterable[Batch], variants: Mapping[str, Variant], with_loss: bool = False
) -> dict[str, Measurement]:
    """
    Runs every variant of `model` on every batch, one after the other, so that no choice need be kept.

    Args:
        model (`torch.nn.Module`): a patched model.
        batches (`Iterable[Mapping]`): what the model takes.
        variants (`Mapping[str, Callable]`): what makes a context in which the model is that variant.
        with_loss (`bool`, *optional*, defaults to `False`):
            Whether to measure the loss as well: of the labels in a batch, or of its own next tokens. Of a classifier see `Measurement`.

    Returns:
        `dict[str, Measurement]`: by the names of the variants.

    Raises:
        ValueError: if there is no batch.
    """
    counts = {name: _Counts() for name in variants}
    with looking(model) as look:
        for batch in batches:
            first: dict[int, Tensor] = {}
            expected: Tensor | None = None
            for name, variant in variants.items():
                counted = counts[name]

                def note(index: int, logits: Tensor, chosen: Tensor, counted=counted, first=first) -> None:
                    mask = look.mask_of(index, len(logits))
                    counted.add(index, chosen, mask, logits.shape[-1], first.setdefault(index, chosen))

                look.on_choice = note
                with variant():
                    output = look.forward(batch, with_head=with_loss)
                counted.tokens += int(look.mask.sum())
                if with_loss and predicts_tokens(model):
                    counted.add_loss(output.logits, batch)
                elif with_loss:
                    expected = output.logits if expected is None else expected
                    counted.add_distance(output.logits, expected, look.mask)
    if not any(counted.tokens for counted in counts.values()):
        raise ValueError("there is nothing to measure on: `batches` hold no token that counts.")
    return {name: counted.figures(look) for name, counted in counts.items()}


class _Counts:
    """Sums of one variant."""

    def __init__(self) -> None:
        self.loads: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.tokens = 0
        self.loss, self.predicted = 0.0, 0

    def add(self, index: int, chosen_Tk: Tensor, mask_T: Tensor, experts: int, first_Tk: Tensor) -> None:
        mask_T = mask_T.to(chosen_Tk.device)
        counted_Nk = chosen_Tk[mask_T]
        load_E = torch.bincount(counted_Nk.reshape(-1), minlength=experts)
        kept = (counted_Nk.unsqueeze(-1) == first_Tk[mask_T].unsqueeze(-2)).any(-1).sum()
        self.loads[index] = self.loads.get(index, 0) + load_E
        self.kept[index] = self.kept.get(index, 0) + kept

    def add_loss(self, logits_BSV: Tensor, batch: Batch) -> None:
        labels_BS = batch.get("labels")
        if labels_BS is None:
            attention = batch.get("attention_mask")
            labels_BS = (
                batch["input_ids"] if attention is None else batch["input_ids"].masked_fill(attention == 0, -100)
            )
        wanted = labels_BS[:, 1:].to(logits_BSV.device).reshape(-1)
        logits = logits_BSV[:, :-1].reshape(len(wanted), -1).float()
        self.loss += float(nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"))
        self.predicted += int((wanted != -100).sum())

    def add_distance(self, logits: Tensor, expected: Tensor, mask_T: Tensor) -> None:
        """Adds how far the predictions of a classifier are from the `expected`; both are `(B, labels)` or `(B, S, labels)`."""
        if logits.ndim == 3:
            logits, expected = (part.flatten(0, 1)[mask_T.to(part.device)] for part in (logits, expected))
        logits, expected = logits.float(), expected.float()
        if logits.shape[-1] == 1:
            self.loss += float((logits - expected).square().sum())
        else:
            self.loss += float(nn.functional.cross_entropy(logits, expected.softmax(-1), reduction="sum"))
        self.predicted += len(logits)

    def figures(self, look: Look) -> Measurement:
        names = {index: look.sites[index].name for index in sorted(self.loads)}
        loads = {name: self.loads[index].double().cpu() for index, name in names.items()}
        changed = {name: 1 - float(self.kept[i]) / max(float(loads[name].sum()), 1.0) for i, name in names.items()}
        return Measurement(loads, changed, self.loss / self.predicted if self.predicted else None, self.tokens)
