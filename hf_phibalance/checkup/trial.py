"""A step that is tried out, and what is kept meanwhile so that it leaves no trace."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..balancing import PhiBalancer, RandomState
from ..routers import unwrap


ROWS, LONGEST = 4, 32  # of a made batch
CHECKPOINTING = "_gradient_checkpointing_func"


class Step(Protocol):
    """One optimizer step as it will be taken, without the optimizer's part."""

    what: str
    lowered: float | None  # the loss scale of the trial, where it is not that of the training

    @property
    def loss_scale(self) -> float:
        """What its gradients are divided by before the optimizer sees them."""

    def lower_loss_scale(self) -> bool:
        """Lowers it for the trial, after an overflow; returns whether that was possible."""

    def run(self) -> None:
        """Runs all its forwards and backwards, so that the parameters have their gradients."""


class RawStep:
    """
    The step of a loop as one writes it: the mean loss of its micro-batches.

    Args:
        model (`torch.nn.Module`): as the loop calls it.
        balancer (`PhiBalancer`): that of the model.
        batches (`Sequence[Mapping]`): the micro-batches.
        what (`str`): how to call them in the report.
    """

    loss_scale: float = 1.0
    lowered: float | None = None

    def __init__(
        self, model: nn.Module, balancer: PhiBalancer, batches: Sequence[Mapping[str, Any]], what: str
    ) -> None:
        self.model, self.balancer, self.what = model, balancer, what
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self.batches = [
            {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()} for batch in batches
        ]

    def lower_loss_scale(self) -> bool:
        return False

    def run(self) -> None:
        self.model.train()
        self.balancer.begin_step(self.batches)
        for batch in self.batches:
            output = self.model(**batch)
            loss = getattr(output, "loss", None)
            (output[0].float().mean() if loss is None else loss / len(self.batches)).backward()


def made_batch(model: nn.Module) -> dict[str, Tensor]:
    """Rows of made tokens of unequal lengths, padded on the right; the random numbers of the process stay."""
    root: Any = unwrap(model)[-1]
    config = root.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id
    ids = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, (ROWS, LONGEST), generator=generator)
    mask = torch.arange(LONGEST) < LONGEST - 5 * torch.arange(ROWS)[:, None]
    special = [
        v for n, v in vars(root.config).items() if n.endswith(("_token_id", "_token_index")) and isinstance(v, int)
    ]
    plain = next(i for i in range(min(3, config.vocab_size - 1), config.vocab_size) if i not in special)
    ids[torch.isin(ids, torch.tensor(special, dtype=ids.dtype))] = plain  # there are no images for their places
    filler = pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0
    return {
        "input_ids": ids.masked_fill(~mask, filler),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


class Kept:
    """
    What a trial may change of a model and its process, put back at the end: random numbers, gradients, buffers, modes.

    Args:
        model (`torch.nn.Module`): the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Kept:
        self._random = RandomState()
        self._gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers() if not buffer.is_meta]
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.clear_gradients()
        return self

    def clear_gradients(self) -> None:
        for parameter, _ in self._gradients:
            parameter.grad = None

    def rewind(self) -> None:
        """Back to the random numbers and buffers of the beginning, for another run of the same."""
        self._random.restore()
        with torch.no_grad():
            for buffer, kept in self._buffers:
                buffer.copy_(kept)

    def __exit__(self, *exception: object) -> None:
        self.rewind()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for module, training in self._modes:
            module.training = training


@contextmanager
def without_reentrant_checkpointing(root: nn.Module) -> Iterator[None]:
    """Meanwhile, reentrant gradient checkpointing is of the other kind, whose forwards have an autograd graph."""
    kept = [
        (module, vars(module)[CHECKPOINTING])
        for module in root.modules()
        if is_reentrant(vars(module).get(CHECKPOINTING))
    ]
    for module, _ in kept:
        setattr(module, CHECKPOINTING, functools.partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        for module, function in kept:
            setattr(module, CHECKPOINTING, function)


def is_reentrant(function: Any) -> bool:
    """Whether what a layer checkpoints with is reentrant."""
    return isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False
