"""
The forwards of a patched model: which count their tokens, and which add the auxiliary gradient.

| forward | recognized by | its tokens count | adds the auxiliary gradient |
|---|---|---|---|
| training | `train()`, gradients on, no backward running | in the step, when its backward comes | once per router |
| recomputed (both kinds of checkpointing, of layers or of the whole model) | a backward is running | no | what its forward has not added |
| abandoned (graph dropped, exception, a metric in train mode) | its graph is gone | no | no |
| differentiated twice (`create_graph`) | gradients on in its backward | yes | only if a first-order backward follows |
| evaluation | [`~PhiBalancer.evaluation`] is open, no cache | in the evaluation | no |
| generation | `evaluation(generation=True)` is open | prompt and new tokens, each once; finished rows never | no |
| any other, for example of a frozen teacher or in another thread | | no | no |
| compiled | `torch.compile` | as above; also if its graph is dropped | as above |

The selection bias acts in all of them. Each thread has its own current forward, so one thread can serve while another trains.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..maths import SCORINGS, margin_histogram, price_now, routing_probs, sequence_price
from ..routers import BiasedTopK, RouterSite, image_tokens
from .counts import Counts
from .duals import LOGIT_WIDTH
from .gradient import add_gradient, new_key
from .process import backward_node, in_backward, loss_scale, running_backward, unrecorded
from .step import Forward
from .tokens import Tokens, count_mask, count_padding, hidden_of, packed_sequences


if TYPE_CHECKING:
    from .balancer import PhiBalancer


CACHES = ("cache", "past_key_values")  # possible names of a model's cache argument
EVALUATION = 1  # number of a compiled forward of an evaluation; those of training are even


class Evaluation:
    """
    Counts of the forwards in an open [`~PhiBalancer.evaluation`]. Their `extra` is the load without our selection bias. `end_ids` end
    a row, if generation is counted.
    """

    def __init__(self, counts: Counts, end_ids: list[int] | None = None) -> None:
        self.counts, self.end_ids = counts, end_ids
        self._is_over: Tensor | None = None  # (B,) rows of the current generation that have ended
        self._ids: Tensor | None = None  # (B, S) input of its last forward

    def mask_of_generation(self, inputs: Mapping[str, Any], mask_BS: Tensor) -> Tensor:
        """Returns the token mask of a generation's forward: the prompt without padding, then the new token of each open row."""
        cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
        ids = inputs.get("input_ids")
        goes_on = cache is not None and bool(cache.get_seq_length())
        if not goes_on and ids is not None and self._ids is not None:  # without a cache all tokens are passed again
            goes_on = ids.shape[1] > self._ids.shape[1] and torch.equal(ids[:, : self._ids.shape[1]], self._ids)
            mask_BS = mask_BS.clone()
            mask_BS[:, : self._ids.shape[1]] &= not goes_on
        self._ids = ids
        if not goes_on or self._is_over is None or len(mask_BS) != len(self._is_over):
            self._is_over = mask_BS.new_zeros(len(mask_BS))
            return mask_BS
        counted = ~self._is_over[:, None] & mask_BS
        if ids is not None:
            self._is_over |= torch.isin(ids[:, -1], ids.new_tensor(self.end_ids))
        return counted

    def end_rows(self, over_B: Tensor) -> None:
        """Stops counting the rows of the current generation that something else than an id has ended, `(B,)`."""
        if self._is_over is not None and len(self._is_over) == len(over_B):
            self._is_over |= over_B


class _ThreadState(threading.local):
    """State of one thread."""

    forward: Forward | Evaluation | None = None  # the current one
    tokens: Tokens | None = None  # of the current forward
    micro_batch: int | None = None  # of a Trainer's step
    replaying = False

    def __init__(self) -> None:
        # labels of the batch, which the backbone does not get; the last entry is in use
        self.labels: list[Tensor | None] = []


class Forwards:
    """The forwards of one patched model. The hooks on its backbone and routers call it; it is a [`RouterBalancer`]."""

    def __init__(self, balancer: PhiBalancer) -> None:
        self.balancer = balancer
        self._begin()

    def _begin(self) -> None:
        self._thread = _ThreadState()
        self._key = new_key(self)
        # for compiled code, which cannot read the state of its thread: number of the current forward, labels, replaying
        self._number: Tensor | None = None
        self._labels: Tensor | None = None
        self._replaying = False
        self.evaluation: Evaluation | None = None
        self.watch: Callable[[int, Tensor], None] | None = None  # called with the scores that a router ranks
        self.recorder: Any = None  # a `StepRecorder` of the subpackage `diagnosis`, while a step is recorded

    def __getstate__(self) -> dict[str, Any]:
        return {"balancer": self.balancer}  # a copy has no current forward

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.balancer = state["balancer"]
        self._begin()

    @property
    def sites(self) -> Sequence[RouterSite]:
        return self.balancer.sites

    @property
    def owner(self) -> nn.Module | None:
        return self.balancer.backbone

    # ------------------------------------------------------------------ what is set around a forward

    @contextmanager
    def labels_of(self, labels: Tensor | None, micro_batch: int | None = None) -> Iterator[None]:
        """Context manager: forwards inside it use `labels` (B, S) and belong to `micro_batch` of a Trainer's step."""
        thread, outer = self._thread, self._thread.micro_batch
        self.push_labels(labels)
        thread.micro_batch = outer if micro_batch is None else micro_batch
        try:
            yield
        finally:
            thread.micro_batch = outer
            self.pop_labels()

    def push_labels(self, labels: Tensor | None) -> None:
        """Lets forwards use `labels` (B, S) until [`~Forwards.pop_labels`]; `None` keeps the labels in use."""
        if torch.compiler.is_compiling():
            self._labels = labels
            return
        stack = self._thread.labels
        stack.append(labels if labels is not None or not stack else stack[-1])
        self._labels = stack[-1]

    def pop_labels(self) -> None:
        if not torch.compiler.is_compiling():
            stack = self._thread.labels
            stack.pop()
            self._labels = stack[-1] if stack else None

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context manager: routers called inside it are told from outside what to select."""
        thread, outer = self._thread, self._thread.replaying
        thread.replaying = self._replaying = True
        try:
            yield
        finally:
            thread.replaying = self._replaying = outer

    @contextmanager
    def showing_scores(self, watch: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Context manager: inside it routers call `watch(index, scores)` with the scores `(..., E)` before their bias is added."""
        self.watch = watch
        try:
            yield
        finally:
            self.watch = None

    # ------------------------------------------------------------------ a forward of the backbone

    def run(self, backbone: nn.Module, inner: Callable, inputs: Mapping[str, Any], args: tuple, kwargs: dict) -> Any:
        """Runs `inner(*args, **kwargs)`, the forward of `backbone`; `inputs` are its arguments by name."""
        if torch.compiler.is_compiling():
            self._number = self._open_traced(backbone, inputs)
            return inner(*args, **kwargs)
        thread = self._thread
        outer = thread.forward, thread.tokens
        try:
            self._open(backbone, inputs)
            self._number = torch.tensor(_number_of(thread.forward))  # for layers that are compiled one by one
            output = inner(*args, **kwargs)
            if isinstance(thread.forward, Forward) and thread.forward.share is None:
                self._settle_at(output, thread.forward)
            return output
        except BaseException:
            BiasedTopK.leave_interrupted()  # Ctrl-C runs no hook of a module
            if isinstance(thread.forward, Forward) and not in_backward():  # the traceback may keep it alive
                thread.forward.step.alive.pop(thread.forward.key, None)
            raise
        finally:
            thread.forward, thread.tokens = outer

    def _open(self, backbone: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Makes the forward that begins with these `inputs` the current one, by the table above."""
        thread, node, evaluation = self._thread, backward_node(), self.evaluation
        thread.forward = thread.tokens = None
        if node is not None and (found := self.balancer.now.find(node)) is not None:
            thread.forward, thread.tokens = found, found.tokens  # checkpointing recomputes the whole backbone
            return
        training = backbone.training and torch.is_grad_enabled()
        generates = evaluation is not None and evaluation.end_ids is not None
        if not training and (evaluation is None or (_has_cache(inputs) and not generates)):
            return
        with unrecorded():
            mask_BS = self._mask(inputs, must_be_known=training)
            if mask_BS is None:
                return  # a second forward of the same batch, for its logits only
            if not training and evaluation is not None and generates:
                mask_BS = evaluation.mask_of_generation(inputs, mask_BS)
            self.begin(mask_BS, *self._parts(inputs, mask_BS, training), training)

    def _open_traced(self, backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Does the same while the compiler traces: computes the token mask, then calls one operator."""
        training = backbone.training and torch.is_grad_enabled()
        mask_BS = self._mask(inputs, must_be_known=training)
        if mask_BS is None:
            return None
        parts = self._parts(inputs, mask_BS, training)
        return torch.ops.phi_balance.open(mask_BS, *parts, training, _has_cache(inputs), self._key)

    def begin(
        self,
        mask_BS: Tensor,
        image_T: Tensor | None,
        sequence_T: Tensor | None,
        padding: Tensor | None,
        training: bool,
        is_cached: bool = False,
    ) -> int:
        """Begins a forward with these tokens. Returns its number in compiled code, -1 if nothing is to be counted."""
        thread, device = self._thread, self.balancer.duals.values.device
        sequence_T = None if sequence_T is None else sequence_T.to(device)
        thread.forward, thread.tokens = None, Tokens(mask_BS.to(device), image_T, sequence_T)
        if training:
            thread.forward = self._begin_training(thread.tokens, padding)
        elif self.evaluation is not None and not is_cached:
            thread.forward = self.evaluation
            self.evaluation.counts.tokens.add_(thread.tokens.count)
        return _number_of(thread.forward)

    def _mask(self, inputs: Mapping[str, Any], must_be_known: bool) -> Tensor | None:
        kind = self.balancer.config.token_mask
        if kind == "labels" and inputs.get("labels") is None:
            stack = [self._labels] if torch.compiler.is_compiling() else self._thread.labels
            inputs = {**inputs, "labels": stack[-1] if stack else None}
        mask_BS = count_mask(inputs, kind, self.balancer.pad_token_id)
        if mask_BS is None and must_be_known:
            missing = "labels" if kind == "labels" and hidden_of(inputs) is not None else "input_ids or inputs_embeds"
            raise ValueError(
                f"token_mask={kind!r}, but this forward received no {missing}. Pass them to the model, or set another token_mask "
                "in PhiBalanceConfig."
            )
        return mask_BS

    def _parts(
        self, inputs: Mapping[str, Any], mask_BS: Tensor, training: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns what else [`~Forwards.begin`] needs: image tokens, sequences of packed rows, and the number of pad tokens that count."""
        config, ids, pad = self.balancer.config, inputs.get("input_ids"), self.balancer.pad_token_id
        sequence_T, padding = packed_sequences(inputs) if config.sequence_coef > 0 else None, None
        if training and config.token_mask == "attention" and inputs.get("attention_mask") is None:
            padding = None if ids is None or pad is None else count_padding(ids, mask_BS, pad)
        return image_tokens(inputs, self.sites), sequence_T, padding

    def _begin_training(self, tokens: Tokens, padding: Tensor | None) -> Forward:
        balancer = self.balancer
        balancer.loop.continue_or_begin(self._thread.micro_batch)
        balancer.duals.keep_native_fp32()
        number = tokens.count
        if balancer.now.tokens is None and balancer.ranks > 1 and balancer.config.adds_gradient:
            number = balancer.sum_over_ranks(number.clone())  # the step was not announced
        forward = Forward(balancer.now, tokens, number, self._thread.micro_batch, balancer.duals.adapter)
        if self._thread.replaying:
            forward.counts.replayed.add_(1)
        if padding is not None:
            forward.counts.padding.copy_(padding)
        return forward

    def _settle_at(self, output: Any, forward: Forward) -> None:
        """Settles `forward` when a backward comes to the backbone's `output`, even if it reaches no router."""
        parts: Any = output.values() if isinstance(output, Mapping) else output
        for part in parts if isinstance(output, (Mapping, tuple, list)) else [output]:
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(lambda gradient: self._come_to(forward))

    def _come_to(self, forward: Forward) -> None:
        """Settles `forward` in the running backward. Adds its prices anew if the gradients of an earlier backward were dropped."""
        if forward.left_gradient and forward.backward != running_backward() and not self._has_gradient():
            forward.added.clear()
        if forward.backward != running_backward():
            forward.backward = running_backward()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._note_gradient(forward))
        self.settle(forward)

    def _note_gradient(self, forward: Forward) -> None:
        """Notes at the end of a backward whether it left a gradient. `torch.autograd.grad` leaves none, and may be added up."""
        forward.left_gradient = self._has_gradient()

    def _has_gradient(self) -> bool:
        """Whether something in the backbone has a gradient, besides embeddings: a head tied to them comes first in a backward."""
        backbone: Any = self.balancer.backbone
        modules = (module for module in backbone.modules() if not isinstance(module, nn.Embedding))
        return any(p.grad is not None for module in modules for p in module.parameters(recurse=False))

    # ------------------------------------------------------------------ a call of a router

    @property
    def is_idle(self) -> bool:
        if torch.compiler.is_compiling():
            return self._number is None
        return self._thread.forward is None and backward_node() is None

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """Counts a call of router `index`, and makes its backward add the auxiliary gradient; see [`RouterReader`]."""
        if torch.compiler.is_compiling():
            return torch.ops.phi_balance.observe(carrier, logits, selected, self._number, index, self._key)
        node, thread = backward_node(), self._thread
        forward: Forward | Evaluation | None = None if node is None else self.balancer.now.find(node)
        if forward is None:
            if thread.forward is None or thread.tokens is None:
                return carrier
            self._count(index, logits, selected, thread.forward.counts, thread.tokens)
            forward = thread.forward
        if not isinstance(forward, Forward):
            return carrier
        own: list[Tensor] = []  # for the recorder
        if self.recorder is not None:
            with unrecorded():
                self.recorder.record_router(forward, index, hidden, logits, selected, own)
        if not torch.is_grad_enabled() or not logits.requires_grad or not self.balancer.config.adds_gradient:
            return carrier
        due = functools.partial(self.due, forward, index, len(logits))
        further = self.further_losses(forward, index, logits)
        replaced = add_gradient(carrier, logits, self.sites[index].scoring, due, *further)
        if self.recorder is not None:
            self.recorder.follow(replaced, logits, own)
        return replaced

    def _count(self, index: int, logits: Tensor, selected: Tensor, counts: Counts, tokens: Tokens) -> None:
        site = self.sites[index]
        expected = tokens.mask_at(site, len(logits)).numel(), site.num_experts
        if tuple(logits.shape) != expected:
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)} where the token mask and the "
                f"patch expect {expected}; this model routes something else than its (batch x sequence) tokens. If experts "
                "were added or removed, patch the model again. If images are among the inputs, input_ids must hold a "
                "placeholder for each vector of an image, as the processor of the model makes them."
            )
        with unrecorded():
            probs, chosen = routing_probs(logits.detach(), site.scoring), selected.detach()
            counts.add(index, site, probs, chosen, tokens)
            if self.balancer.measures_confidence:
                counts.add_confidence(index, site, probs, chosen, tokens)
            if site.has_native_bias and counts.extra.numel():
                by_logits = site.kind.traits.biases == "logits"
                self._use_scores(index, logits if by_logits else SCORINGS[site.scoring].score(logits.float()))

    @torch.no_grad()
    def further_losses(self, forward: Forward, index: int, logits: Tensor) -> tuple[float, Tensor | None]:
        """Returns the coefficient of the z-loss, and the price `(T, E)` of the sequence-wise loss, if there is one."""
        config, site, device = self.balancer.config, self.sites[index], logits.device
        if config.sequence_coef == 0:
            return config.z_loss_coef, None
        with unrecorded():
            mask, sequence = forward.tokens.mask.to(device), forward.tokens.sequences().to(device)
            price = sequence_price(logits.detach(), site.scoring, site.top_k, mask, sequence)
        return config.z_loss_coef, config.sequence_coef * price

    # ------------------------------------------------------------------ its backward

    def settle(self, forward: Forward) -> None:
        """Sets the weight of the tokens of `forward`, whose backward has come, and adds its counts to the step."""
        balancer, step = self.balancer, forward.step
        found = loss_scale()
        if found is not None:
            step.scaler, step.loss_scale = found
        with torch.no_grad():
            for member in step.settle(forward):
                member.price = balancer.coef * self._price_of(member)
                step.counts.balance.add_((member.price * member.counts.probs).sum())
                if self.recorder is not None:
                    self.recorder.settles(member)
        self._number = torch.tensor(forward.key)  # for compiled layers that checkpointing recomputes now
        if torch.is_grad_enabled():
            step.second_order = True
        balancer.loop.idle_steps = 0

    def _price_of(self, forward: Forward) -> Tensor:
        """Returns the prices q of all routers in `forward`, `(L, E)`."""
        config, duals = self.balancer.config, self.balancer.duals
        if config.coef == 0 or config.price_from == "previous":
            return duals.price
        own, so_far = (getattr(counts, config.track) for counts in (forward.counts, forward.step.counts))
        price = torch.zeros_like(duals.price)
        for rows, experts in duals.blocks():
            price[rows, :experts] = price_now(
                duals.potential,
                duals.mean(config.track)[rows, :experts],
                own[rows, :experts],
                so_far[rows, :experts],
                price_from=config.price_from,
                pooled=config.rules.pooled,
                ema_rate=config.ema_rate,
                top_k=self.sites[0].top_k,
                sum_over_ranks=self.balancer.sum_over_ranks,
            )
        return price

    def due(self, forward: Forward, index: int, routed: int) -> tuple[Tensor, Tensor] | None:
        """Returns what router `index` adds in the running backward: weight of each token `(T,)` and coef · q `(E,)`."""
        self.settle(forward)
        if torch.is_grad_enabled() or index in forward.added or forward.share is None or forward.price is None:
            return None  # gradients on: nothing is added to a backward with `create_graph`
        forward.added.add(index)
        site = self.sites[index]
        weight_T = forward.weights(forward.tokens.mask_at(site, routed))
        price_E = forward.price[index, : site.num_experts]
        if self.recorder is not None:
            self.recorder.adds(forward, index, weight_T, price_E)
        return weight_T, price_E

    # ------------------------------------------------------------------ inside a router

    def selection_bias(self, index: int) -> Tensor | None:
        """Returns the bias `(E,)` to add in the selection of router `index`; `None` if there is none or the router adds it."""
        duals, site = self.balancer.duals, self.sites[index]
        replaying = self._replaying if torch.compiler.is_compiling() else self._thread.replaying
        if not duals.has_bias or self.balancer.ignores_bias or site.has_native_bias or replaying:
            return None
        return duals.biases[index, : site.num_experts]

    def choice_bias(self, index: int) -> Tensor | None:
        """Returns the bias `(E,)` in force in the selection of router `index`, the family's own or ours."""
        site = self.sites[index]
        return site.read_native_bias() if site.has_native_bias else self.selection_bias(index)

    def observe_scores(self, index: int, scores: Tensor, are_probs: bool) -> None:
        """Notes that router `index` ranked `scores (..., E)` plus its bias."""
        if self.sites[index].score_width is None and are_probs:
            self.sites[index].score_width = 1.0
        with unrecorded():
            self._use_scores(index, scores.detach())

    def _use_scores(self, index: int, scores: Tensor) -> None:
        """Fills the `extra` counts from the scores that router `index` ranks, if a method or an evaluation needs them."""
        if self.watch is not None:
            self.watch(index, scores)
        forward, tokens, site = self._thread.forward, self._thread.tokens, self.sites[index]
        if forward is None or tokens is None or not forward.counts.extra.numel() or backward_node() is not None:
            return
        scores = scores.reshape(-1, site.num_experts).float()
        extra = forward.counts.extra[index, : site.num_experts]
        mask = tokens.mask_at(site, len(scores))
        if isinstance(forward, Forward):
            bias_E = self.balancer.duals.biases[index, : site.num_experts].to(scores.device)
            width = site.score_width or LOGIT_WIDTH
            extra.add_(margin_histogram(scores, bias_E, site.top_k, mask.to(scores.device), width).to(extra.device))
        elif not site.has_native_bias:
            chosen = scores.topk(site.top_k, dim=-1).indices.reshape(-1).to(extra.device)
            extra[:, 0].scatter_add_(0, chosen, tokens.repeated(mask, site.top_k))

    def count_compiled(self, number: int, index: int, logits: Tensor, selected: Tensor) -> None:
        """Counts a call of router `index` in the forward of this number, unless it is a recomputation."""
        if in_backward():
            return
        if number == EVALUATION:
            if self.evaluation is not None and self._thread.tokens is not None:
                self._count(index, logits, selected, self.evaluation.counts, self._thread.tokens)
        elif (forward := self.balancer.now.alive.get(number)) is not None:
            self._count(index, logits, selected, forward.counts, forward.tokens)


def _has_cache(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in CACHES)


def _number_of(forward: Forward | Evaluation | None) -> int:
    """Returns the number of a forward in compiled code; -1 for none."""
    return forward.key if isinstance(forward, Forward) else -1 if forward is None else EVALUATION
