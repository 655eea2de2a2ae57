"""Forwards of a patched model that only look: nobody counts, nobody pays, and everything is left as it was.

Shapes: B sequences, S long; T = B·S tokens; E experts, k of them chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import PhiBalancer, RandomState, count_mask, get_balancer
from ..routers import RouterReader, find_backbone, reading


Batch = Mapping[str, Any]
OF_TRAINING = ("labels", "num_items_in_batch")  # in a batch, but nothing of the backbone's


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module being left in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Look(RouterReader):
    """
    Who sees the routers of a patched model in forwards that only look; made by [`looking`].

    Attributes:
        mask (`torch.Tensor` of shape `(T,)`): which tokens of the forward under way count, as booleans.
        on_choice (`Callable[[int, Tensor, Tensor], None]`, *optional*):
            Called with the number of a router, its logits `(T, E)` and its choice `(T, k)`.
    """

    is_idle = is_measuring = False

    def __init__(self, balancer: PhiBalancer) -> None:
        self.balancer, self.root, self.sites = balancer, balancer.root, balancer.sites
        self.backbone = find_backbone(balancer.root, balancer.sites)
        self.mask = torch.zeros(0, dtype=torch.bool)
        self.on_choice: Callable[[int, Tensor, Tensor], None] | None = None

    def forward(self, batch: Batch, with_head: bool = False) -> Any:
        """
        Runs the model on `batch`, without its labels.

        Args:
            batch (`Mapping`): what the model takes, with `input_ids` or `inputs_embeds`.
            with_head (`bool`, *optional*, defaults to `False`): whether to go on to the logits of the vocabulary.
        """
        device = next(p.device for p in self.root.parameters() if p.device.type != "meta")
        batch = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}
        mask_BS = count_mask(batch, self.balancer.config.token_mask)
        if mask_BS is None:
            raise ValueError(
                f"a batch holds {sorted(batch)}, which does not tell the tokens that count "
                f"(token_mask={self.balancer.config.token_mask!r}): give batches with input_ids"
                f"{', and labels' if self.balancer.config.token_mask == 'labels' else ''}, as the model gets them."
            )
        self.mask = mask_BS.reshape(-1)
        inputs = {name: part for name, part in batch.items() if name not in OF_TRAINING}
        return (self.root if with_head else self.backbone)(**inputs, use_cache=False)

    def measure(self, index: int, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        """Nothing."""

    def choice_bias(self, index: int) -> Tensor | None:
        return self.balancer.meter.choice_bias(index)

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        if self.on_choice is not None:
            if logits.shape != (self.mask.numel(), self.sites[index].num_experts):
                raise ValueError(
                    f"router {self.sites[index].name!r} returned logits of shape {tuple(logits.shape)} where "
                    f"{self.mask.numel()} tokens and {self.sites[index].num_experts} experts were expected: this model "
                    "routes something else than its tokens."
                )
            self.on_choice(index, logits, selected.reshape(len(logits), -1))
        return carrier


@contextmanager
def looking(model: nn.Module) -> Iterator[Look]:
    """
    While open, forwards through the [`Look`] it yields run in eval mode, without gradient, compilation or a trace in the
    random numbers.

    Raises:
        ValueError: if the model is not patched.
        RuntimeError: in the middle of an optimizer step.
    """
    balancer = get_balancer(model)
    if balancer.is_trained_on:
        raise RuntimeError(
            "an optimizer step is under way, whose gradients belong to the routers as they are: call this between two "
            "steps, after balancer.step()."
        )
    look, random = Look(balancer), RandomState()
    try:
        with evaluating(balancer.root), torch.no_grad(), torch.compiler.set_stance("force_eager"), reading(look):
            yield look
    finally:
        random.restore()


def repeatable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """`batches`, or a list of them if they can be gone through only once."""
    return list(batches) if iter(batches) is batches else batches
