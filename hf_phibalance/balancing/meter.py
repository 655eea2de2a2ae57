"""A forward of a patched model: decides who counts and who pays, counts what every router does, and has it charged.

Shapes: E experts, T tokens of a micro-batch, k experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PhiBalanceConfig
from ..maths import SCORINGS, margin_histogram, routing_probs
from ..routers import RouterSite, Softmax, image_tokens
from .charging import Charging
from .duals import LOGIT_WIDTH, Duals
from .learning import gradient_norms
from .step import Steps
from .tally import Tally, add_load, count_choice
from .tokens import Counted, Tokens


CACHES = ("cache", "past_key_values")  # the argument in which a model takes its cache


class _Here(threading.local):
    """What holds in one thread only, so that one can serve while another trains."""

    is_idle = False  # whether its forward neither counts nor pays
    labels: Tensor | None = None  # that its forwards belong to


class Meter:
    """
    What the hooks on the routers talk to ([`RouterMeter`]).

    Args:
        root (`torch.nn.Module`): the patched model.
        config (`PhiBalanceConfig`): its configuration.
        sites (`Sequence[RouterSite]`): its routers.
        duals (`Duals`): biases and prices in force.
        steps (`Steps`): the optimizer step that the forwards belong to.
    """

    def __init__(
        self, root: nn.Module, config: PhiBalanceConfig, sites: Sequence[RouterSite], duals: Duals, steps: Steps
    ) -> None:
        self.root, self.config, self.sites, self.duals, self.steps = root, config, sites, duals, steps
        self.charging = Charging(config, sites, duals, steps.tally, steps.ranks)
        self._spans = duals.layout.spans
        self.softmax: Softmax | None = None  # noted in the router that is about to be observed
        self.norms: dict[int, Tensor] | None = None  # of the balancing gradient, once there are prices
        self.eval_tally: Tally | None = None  # of the evaluation that is open
        self._here = _Here()
        self._thread: int | None = None  # that runs the forward under way, if it is not compiled
        self._forwarding = False
        self._tokens: Tokens | None = None  # of the forward under way
        self._latest: Tokens | None = None  # of the latest training forward, which its backward may run again
        self._labels: Tensor | None = None
        self._before_forward: Tensor | None = None  # the tally when the forward under way began, where needed
        self._measuring = False
        self._replayer: int | None = None  # thread whose choices come from outside
        self._watch: Callable[[int, Tensor], None] | None = None  # who else wants to see what is ranked

    # ------------------------------------------------------------------ a forward of the backbone

    @property
    def is_idle(self) -> bool:
        """Whether the routers run outside training and evaluation, so that there is nothing to do."""
        return self._current is None

    @property
    def _current(self) -> Tokens | None:
        # what is only written between forwards, and never read, costs torch.compile no guard and no recompilation
        if torch.compiler.is_compiling():
            return self._tokens if self._forwarding else self._latest
        if self._here.is_idle and not _in_backward():  # in which it would be left over from an interrupted forward
            return None
        return self._tokens if self._forwarding and not self._is_elsewhere else self._latest

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the forward under way is that of another thread, for instance of one that serves while this one trains."""
        return self._forwarding and self._thread not in (None, threading.get_ident())

    @contextmanager
    def labels_of(self, labels: Tensor | None) -> Iterator[None]:
        """While open, forwards of the backbone belong to these `labels (B, S)`."""
        self._set_labels(labels)
        try:
            yield
        finally:
            self._set_labels(None)

    def _set_labels(self, labels: Tensor | None) -> None:
        self._labels = labels  # for a compiled backbone, which cannot ask in which thread it runs
        if not torch.compiler.is_compiling():
            self._here.labels = labels

    def _get_labels(self) -> Tensor | None:
        return self._labels if torch.compiler.is_compiling() or self._here.labels is None else self._here.labels

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While open, the choices of the routers are given from outside: see [`PhiBalancer.replaying`]."""
        outer, self._replayer = self._replayer, threading.get_ident()
        try:
            yield
        finally:
            self._replayer = outer

    @property
    def _is_replaying(self) -> bool:
        """Whether the choices come from outside; not those of a thread that serves meanwhile."""
        if torch.compiler.is_compiling() or self._replayer is None or not self._here.is_idle:
            return self._replayer is not None
        return self._replayer == threading.get_ident()

    def open_forward(self, inputs: Mapping[str, Any], training: bool) -> None:
        """A forward of the backbone starts: decides who counts and who pays. `inputs` by argument name."""
        compiling = torch.compiler.is_compiling()
        training = training and torch.is_grad_enabled()
        cached = any(inputs.get(name) is not None for name in CACHES)
        evaluating = self.eval_tally is not None and not training and not cached
        if compiling:
            self._thread = None
        else:
            self._here.is_idle = not (training or evaluating)
            if self._here.is_idle:
                return  # and leaves everything as it is: another thread may be in the middle of its own forward
            self._thread = threading.get_ident()
        self._forwarding, self._tokens = True, None
        if not (training or evaluating):
            return
        if self.config.token_mask == "labels":
            inputs = {**inputs, "labels": self._get_labels()}
        counted = self.steps.count(inputs)
        if counted is None and evaluating:
            return  # a second forward of the same batch, for its logits only
        if counted is None:
            raise ValueError(
                f"token_mask={self.config.token_mask!r}, but this forward received no "
                f"{'labels' if self.config.token_mask == 'labels' else 'input_ids or inputs_embeds'}. Pass them to the "
                "model, or set another token_mask in PhiBalanceConfig."
            )
        image = image_tokens(inputs, self.sites)
        if evaluating and self.eval_tally is not None:
            self.eval_tally.tokens.add_(counted.number)
            self._tokens = Tokens.of(counted, trains=False, image=image)
        else:
            self._open_training(counted, image)

    def _open_training(self, counted: Counted, image: Tensor | None) -> None:
        if not self.steps.now.announced:
            self.steps.begin_implicitly()
        self.steps.now.trained = True
        self.steps.tally.tokens.add_(counted.number)
        if self._is_replaying:
            self.steps.tally.replayed.add_(1)
        divisor = self.steps.divisor(counted) if self.config.charges else None
        self._tokens = Tokens.of(counted, divisor, image=image)
        if self.config.rules.pooled:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"method={self.config.method!r} prices a layer by those after it, which torch.compile cannot "
                    "follow. Train without it, or use method='switch'."
                )
            self._tokens.toll = torch.zeros_like(self.duals.toll)
            self._before_forward = self.steps.tally.flat.clone()
        if not torch.compiler.is_compiling() and self.norms is None and self.config.coef > 0 and self.duals.steps > 0:
            self.norms, self._measuring = {}, True

    def close_forward(self) -> None:
        """The forward of the backbone has ended, also by an exception."""
        if not torch.compiler.is_compiling():
            was_idle, self._here.is_idle = self._here.is_idle, False
            if was_idle:
                return
            self._measuring = False
        if self._tokens is not None and self._tokens.trains:
            if self._tokens.toll is not None and self._before_forward is not None:
                self.charging.fill_pooled(self._tokens.toll, self._before_forward)
            self._tokens.in_forward = False
            self._latest = self._tokens
        self._forwarding, self._tokens = False, None

    # ------------------------------------------------------------------ a call of a router

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """
        Counts what router `index` did and charges it; returns `carrier`, through which the charge will be paid.

        Args:
            logits (`torch.Tensor` of shape `(T, E)`), selected (`torch.Tensor` of shape `(..., k)`),
            carrier (`torch.Tensor`): any differentiable output of the router.
        """
        tokens, softmax = self._current, self._take_softmax(logits)
        if tokens is None:
            return carrier
        site = self.sites[index]
        if not tokens.in_forward:
            if not tokens.deferred:
                return self.charging.repeat(index, logits, softmax, carrier)
            self._check_recomputed(tokens)
        own = tokens.reaching(site, len(logits))
        if logits.shape != (own.mask.numel(), site.num_experts):
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)} where the token mask and the "
                f"patch expect {(own.mask.numel(), site.num_experts)}; this model routes something else than its "
                "(batch x sequence) tokens. Patching after changing the number of experts may help; so may input_ids that "
                "hold a placeholder for each vector of an image, as the processor of the model makes them."
            )
        if softmax is not None and site.score_width is None:
            site.score_width = 1.0  # its softmax comes before its top-k
        pays = self.config.charges and tokens.trains
        probs = None
        with torch.no_grad():
            if tokens.trains:
                # also where nobody asks for them: what is not finite shows in them, and not in the choice
                probs = routing_probs(logits, site.scoring) if softmax is None else softmax.probs.detach()
            if tokens.in_forward:
                self._count(index, logits, probs, selected, own)
        if not pays:
            return carrier
        if not torch.is_grad_enabled():
            if not tokens.deferred:
                tokens.deferred = True
                self.steps.now.deferred.append(tokens)
            return carrier
        if not logits.requires_grad:
            return carrier
        return self.charging.charge(index, logits, probs, selected, softmax, carrier, own)

    def _count(self, index: int, logits: Tensor, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> None:
        tally = self.steps.tally if tokens.trains else self.eval_tally
        assert tally is not None
        count_choice(tally, index, probs, selected, tokens)
        site = self.sites[index]
        if self._needs_scores and site.native_bias:
            ranks_logits = site.kind.traits.biases == "logits"
            self.observe_scores(index, logits if ranks_logits else SCORINGS[site.scoring].score(logits.float()))

    def _check_recomputed(self, tokens: Tokens) -> None:
        """Reentrant checkpointing recomputes the latest forward; refuses to guess if an earlier one is still due."""
        tokens.recomputing = True
        if not all(other.recomputing for other in self.steps.now.deferred):
            raise RuntimeError(
                "Several forwards ran before one backward under reentrant gradient checkpointing, so a recomputation "
                "cannot tell whose tokens it recomputes. Use gradient_checkpointing_kwargs={'use_reentrant': False}, "
                "or run backward after each forward."
            )

    # ------------------------------------------------------------------ inside a router

    def selection_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that the selection of router `index` has to add, `None` if it has none or adds it itself."""
        if not self.duals.has_bias or self.sites[index].native_bias or self._is_replaying:
            return None
        return self.duals.bias[self._spans[index]]

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that was in force in the selection of router `index`, wherever it is kept."""
        return self.sites[index].read_native_bias() if self.sites[index].native_bias else self.selection_bias(index)

    def wants_softmax(self, index: int) -> bool:
        """Whether to note the softmax of router `index`, so that it need not be computed again."""
        tokens = None if torch.compiler.is_compiling() else self._current
        return tokens is not None and tokens.trains and self.sites[index].scoring == "softmax"

    def _take_softmax(self, logits: Tensor) -> Softmax | None:
        """The softmax that the router at hand took of its `logits`, in full precision, if it did."""
        if torch.compiler.is_compiling():
            return None
        softmax, self.softmax = self.softmax, None
        usable = softmax is not None and softmax.is_of(logits) and softmax.probs.element_size() >= 4
        return softmax if usable else None

    @contextmanager
    def showing_scores(self, watch: Callable[[int, Tensor], None]) -> Iterator[None]:
        """While open, `watch(index, scores)` sees the scores `(..., E)` to which the bias of router `index` is added."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    @property
    def _needs_scores(self) -> bool:
        """Whether the method wants to see the scores that the routers rank."""
        return self.steps.tally.bins > 0

    @torch.no_grad()
    def observe_scores(self, index: int, scores: Tensor) -> None:
        """Notes what router `index` ranks, `scores (T, E)` without the bias, where the method needs it."""
        if self._watch is not None and not torch.compiler.is_compiling():
            self._watch(index, scores)
        site = self.sites[index]
        if site.score_width is None and not torch.compiler.is_compiling():  # read off the device once
            site.score_width = 1.0 if bool(((scores >= 0) & (scores <= 1)).all()) else LOGIT_WIDTH
        tokens = self._current
        if tokens is not None and not tokens.trains and self.eval_tally is not None:
            self._count_plain_choice(self.eval_tally, index, scores, tokens)
        if not self._needs_scores or tokens is None or not (tokens.in_forward and tokens.trains):
            return
        scores = scores.detach().reshape(-1, site.num_experts).float()
        bias_E = self.duals.bias[self._spans[index]].to(scores.device)
        mask = tokens.reaching(site, len(scores)).mask.to(scores.device)
        histogram = margin_histogram(scores, bias_E, site.top_k, mask, site.score_width or LOGIT_WIDTH)
        self.steps.tally.margins_of(index).add_(histogram.to(self.steps.tally.flat.device))

    def _count_plain_choice(self, tally: Tally, index: int, scores: Tensor, tokens: Tokens) -> None:
        """Counts what router `index` would choose without the bias."""
        site = self.sites[index]
        if not site.native_bias and not torch.compiler.is_compiling():
            chosen_Tk = scores.reshape(-1, site.num_experts).topk(site.top_k, dim=-1).indices
            own = tokens.reaching(site, len(chosen_Tk))
            chosen = chosen_Tk.reshape(-1)
            add_load(tally.plain_load_of(index), chosen, own.weights(chosen).to(chosen.device))

    # ------------------------------------------------------------------ for the learning report

    @property
    def is_measuring(self) -> bool:
        """Whether this forward is the one whose balancing gradient [`~PhiBalancer.learning_report`] shows."""
        return not torch.compiler.is_compiling() and self._measuring

    @torch.no_grad()
    def measure(self, index: int, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        """Notes the norms of the balancing gradient of router `index`, called as `module(hidden, ...)`."""
        if self._tokens is None or self.norms is None:
            return
        mask = self._tokens.reaching(self.sites[index], len(logits)).mask.to(logits.device)
        rate = mask / self._tokens.mask.sum().clamp(min=1).to(logits.device)
        price = self.duals.toll[self._spans[index]].to(logits.device)
        self.norms[index] = gradient_norms(hidden, module, logits, price, rate, self.sites[index].scoring)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the forward and the evaluation under way."""
        fleeting = {"_forwarding": False, "_tokens": None, "_latest": None, "_labels": None, "softmax": None}
        fleeting |= {
            "_replayer": None,
            "_thread": None,
            "_before_forward": None,
            "_measuring": False,
            "_watch": None,
            "eval_tally": None,
        }
        return {**{name: value for name, value in vars(self).items() if name != "_here"}, **fleeting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._here = _Here()


def _in_backward() -> bool:
    """Whether this thread is inside a backward pass, where routers only run to be recomputed."""
    return torch._C._current_graph_task_id() != -1
