"""Forwards of a patched model that only look: nobody counts, nobody pays, and everything is left as it was.

Shapes: B sequences, S long; T = B·S tokens; E experts, k of them chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..files import quoted
from ..maths import max_vio
from ..routers import find_backbone, image_tokens, mask_of, reading, unwrap
from .adapters import refuse_virtual_tokens
from .patching import get_balancer
from .random_state import RandomState
from .tokens import count_mask


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


@dataclass
class Measurement:
    """
    How one variant does.

    Attributes:
        loads (`dict[str, Tensor]`): assignments per expert by layer name, `(E,)`.
        changed (`dict[str, float]`): share of a layer's assignments that the first variant does not make.
        loss (`float`, *optional*):
            Mean over the tokens to be predicted, if it was asked for. Of a classifier, the mean cross-entropy of its predictions
            against those of the first variant; of a model with one score, the mean squared distance from that variant's.
        tokens (`int`): that counted.
    """

    loads: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    tokens: int = 0

    @property
    def max_vio(self) -> dict[str, float]:
        """MaxVio over all batches together, by layer name."""
        return {name: float(max_vio(load_E[None])) for name, load_E in self.loads.items()}

    @property
    def max_vio_global(self) -> float:
        """Its mean over the layers."""
        return statistics.fmean(self.max_vio.values())

    @property
    def changed_share(self) -> float:
        """Share of all assignments that the first variant does not make."""
        return statistics.fmean(self.changed.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain numbers, without the loads."""
        return {
            "loss": self.loss,
            "max_vio_global": self.max_vio_global,
            "changed": self.changed_share,
            "tokens": self.tokens,
        }


class Look:
    """
    Who sees the routers of a patched model in forwards that only look; made by [`looking`].

    Attributes:
        mask (`torch.Tensor` of shape `(T,)`):
            Which tokens of the forward under way count, as booleans; [`~Look.mask_of`] tells those that reach a router.
        on_choice (`Callable[[int, Tensor, Tensor], None]`, *optional*):
            Called with the number of a router, its logits `(T, E)` and its choice `(T, k)`.
        hidden (`dict[int, Tensor]`): by number, what the routers were called with last, or the experts beside them.
    """

    is_idle = False

    def __init__(self, model: nn.Module) -> None:
        balancer = get_balancer(model)
        self.balancer, self.root, self.sites = balancer, balancer.root, balancer.sites
        self._model = model
        # what is sharded has to be entered from outside
        self._headless = model if is_sharded(model) else find_backbone(balancer.root, balancer.sites)
        self.mask = torch.zeros(0, dtype=torch.bool)
        self._image: Tensor | None = None
        self.on_choice: Callable[[int, Tensor, Tensor], None] | None = None
        self.hidden: dict[int, Tensor] = {}

    def forward(self, batch: Batch, with_head: bool = False) -> Any:
        """
        Runs the model on `batch`, without its labels.

        Args:
            batch (`Mapping`): what the model takes, with `input_ids` or `inputs_embeds`.
            with_head (`bool`, *optional*, defaults to `False`): whether to go on to the logits of the vocabulary.
        """
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"`batches` must be batches as the model gets them, such as {{'input_ids': ...}}, but one of them is "
                f"{quoted(batch)}. If you have a single batch, pass [batch]."
            )
        device = next(p.device for p in self.root.parameters() if p.device.type != "meta")
        batch = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}
        mask_BS = count_mask(batch, self.balancer.config.token_mask)
        if mask_BS is None:
            raise ValueError(
                f"a batch holds {sorted(batch)}, which does not tell the tokens that count "
                f"(token_mask={self.balancer.config.token_mask!r}): give batches with input_ids"
                f"{', and labels' if self.balancer.config.token_mask == 'labels' else ''}, as the model gets them."
            )
        self.mask, self._image = mask_BS.reshape(-1), image_tokens(batch, self.sites)
        self.hidden.clear()
        inputs = {name: part for name, part in batch.items() if name not in OF_TRAINING}
        return (self._model if with_head else self._headless)(**inputs, use_cache=False)

    def mask_of(self, index: int, routed: int) -> Tensor:
        """Which of the `routed` vectors that reach router `index` count, `(routed,)` as booleans."""
        mask_T = mask_of(self.sites[index], self.mask, self._image, routed)
        if mask_T.numel() != routed:
            raise ValueError(
                f"router {self.sites[index].name!r} routed {routed} vectors where {mask_T.numel()} tokens were expected: this "
                "model routes something else than its tokens."
            )
        return mask_T

    @property
    def owner(self) -> nn.Module:
        return self.root

    def choice_bias(self, index: int) -> Tensor | None:
        return self.balancer.forwards.choice_bias(index)

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        if hidden is not None:
            self.hidden[index] = hidden
        if self.on_choice is not None:
            self.on_choice(index, logits, selected.reshape(len(logits), -1))
        return carrier


@contextmanager
def looking(model: nn.Module) -> Iterator[Look]:
    """
    While open, forwards through the [`Look`] it yields run in eval mode, without gradient, compilation or a trace in the
    random numbers.

    Raises:
        ValueError: if the model is not patched, or PEFT puts virtual tokens in front of its batches.
        RuntimeError: in the middle of an optimizer step.
    """
    balancer = get_balancer(model)
    if balancer.is_trained_on:
        raise RuntimeError(
            "an optimizer step is under way, whose gradients belong to the routers as they are: call this between two "
            "steps, after balancer.step()."
        )
    refuse_virtual_tokens(model)
    look, random = Look(model), RandomState()
    try:
        with evaluating(balancer.root), torch.no_grad(), torch.compiler.set_stance("force_eager"), reading(look):
            yield look
    finally:
        random.restore()


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of `model` are spread over ranks: by FSDP, tensor parallelism or DeepSpeed."""
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in unwrap(model))
    return flat or any(hasattr(p, "device_mesh") or hasattr(p, "ds_shape") for p in model.parameters())


def repeatable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """`batches`, or a list of them if they can be gone through only once."""
    return list(batches) if iter(batches) is batches else batches
