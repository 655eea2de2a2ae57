"""The state of φ-balancing: means, prices and biases of all routers, and how a step moves them.

Shapes: L routers, E experts. Everything lies in flat fp32 buffers, router after router, so that a step costs a handful
of kernels however many layers there are; `Layout.runs` views a stretch of routers with equally many experts as (L, E).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..config import PhiBalanceConfig
from ..maths import centred_price, quantile_bias, step_within
from ..routers import RouterSite
from .state import check_state
from .tally import StepTally


LOGIT_WIDTH = 16.0  # span that is taken for that of scores which are no probabilities


class Layout:
    """Where each router's experts are in a flat buffer."""

    def __init__(self, sites: Sequence[RouterSite]) -> None:
        self.names = [site.name for site in sites]
        self.sizes = [site.num_experts for site in sites]
        bounds = list(itertools.accumulate(self.sizes, initial=0))
        self.spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.total = bounds[-1]

    def runs(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Stretches of routers with the same number of experts: their span in a flat buffer, and (L, E)."""
        start = 0
        for experts, group in itertools.groupby(self.sizes):
            layers = len(list(group))
            yield slice(start, start + layers * experts), (layers, experts)
            start += layers * experts

    def by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """Copies of the routers' parts of `flat`, each `(E,)`, by layer name."""
        return {name: flat[span].clone() for name, span in zip(self.names, self.spans)}


class Duals:
    """
    EMA means m, centred prices q = ∇φ(E·m) and selection biases b of all routers.

    Whatever steps have come, all are finite, and

    - each mean is a distribution over the experts of its router; it misses the one of exact arithmetic by at most
      2^-24 / η, and its sum misses 1 by as much;
    - no price is farther from another than f'(E) - f'(0): 20.1 for the negative entropy and 512 experts;
    - no bias is farther from the mean of its router's than twice what the scores that it is added to can be from each other
      (1 for probabilities, [`LOGIT_WIDTH`] for logits), so that it outweighs any of them, or than a checkpoint has brought
      it. Every few steps it is brought back within once of that.

    Args:
        config (`PhiBalanceConfig`): potential, EMA rate, tracked statistics, step of the bias.
        sites (`Sequence[RouterSite]`): the routers; a family's own selection bias is taken over as start.
    """

    def __init__(self, config: PhiBalanceConfig, sites: Sequence[RouterSite]) -> None:
        self.config = config
        self.sites = sites
        self.layout = Layout(sites)
        self.steps = 0
        uniform = torch.cat([torch.full((size,), 1 / size) for size in self.layout.sizes])
        self._means = uniform.repeat(len(config.statistics), 1)  # (S, sum of experts)
        self._prices = torch.zeros_like(self._means)  # of each statistic
        self.toll = torch.zeros(self.layout.total)  # coef · price, what a token is charged
        self.bias = torch.zeros(self.layout.total)
        self._reach: Tensor | None = None  # span of the scores that each bias is added to, as far as it is known
        self._widths: list[float] = []  # that it was made of
        self._bounded_every = 1  # steps
        self.read_native_biases()
        self.has_bias = config.bias_coef > 0
        self._potential = config.build_potential()

    @property
    def means(self) -> dict[str, Tensor]:
        """The EMA of each statistic that is kept, flat."""
        return dict(zip(self.config.statistics, self._means))

    def to(self, device: torch.device) -> None:
        self._means = self._means.to(device)
        self._prices, self.toll, self.bias = self._prices.to(device), self.toll.to(device), self.bias.to(device)
        self._reach = None

    # ------------------------------------------------------------------ one step

    @torch.no_grad()
    def update(self, tally: StepTally) -> None:
        """
        m <- (1 - η) m + η s; q = ∇φ(E·m), centred; b by the rule of the method, for φ b <- b - bias_coef · q
        (arXiv 2605.15403, Algorithm 1).

        Args:
            tally (`StepTally`):
                Sums over the step's tokens, of which s is the share. If any of them replayed, the biases stay; if anything
                in it is not finite, all does.
        """
        biases_move = self._fold(tally.by_statistic(self.config.statistics), tally.bounds())
        self._set_price()
        if self.config.bias_coef > 0:
            self.read_native_biases()
            self._move_biases(tally, biases_move)
            self._write_native_biases()
        self.steps += 1

    def _fold(self, sums: Tensor, bounds: Tensor) -> list[Tensor]:
        """
        Mixes `sums (S, sum of experts)` into the means; a router that saw no token keeps its mean.

        Args:
            bounds (`torch.Tensor` of shape `(2,)`): what the sums of a router exceed if its means move, and if its biases do.

        Returns:
            `list[torch.Tensor]`: for each stretch of routers, of which of them the biases move, `(L, 1)`.
        """
        biases_move = []
        for span, shape in self.layout.runs():
            sums_SLE, mean_SLE = sums[:, span].unflatten(1, shape), self._means[:, span].unflatten(1, shape)
            total_SL1 = sums_SLE.sum(dim=-1, keepdim=True)
            means_move_SL1, biases_move_SL1 = total_SL1 > bounds.view(2, 1, 1, 1)
            mean_SLE.lerp_(torch.where(means_move_SL1, sums_SLE / total_SL1, mean_SLE), self.config.ema_rate)
            biases_move.append(biases_move_SL1[0])
        return biases_move

    def _set_price(self) -> None:
        self._prices = self._priced(self._means)
        if self.config.coef > 0:
            torch.mul(self.price, self.config.coef, out=self.toll)

    def _priced(self, means: Tensor) -> Tensor:
        """The prices of `means (S, sum of experts)`."""
        parts = [
            centred_price(self._potential, means[:, span].unflatten(1, shape)).flatten(1)
            for span, shape in self.layout.runs()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def price(self) -> Tensor:
        """The prices behind the gradient, flat."""
        return self._price_of(self.config.track)

    def _price_of(self, statistic: str) -> Tensor:
        return self._prices[self.config.statistics.index(statistic)]

    def _move_biases(self, tally: StepTally, move: Sequence[Tensor]) -> None:
        """Adds the step to the biases of the routers that `move`."""
        rate, direction = self._bias_step(tally)
        direction = self._held_where_masked(direction, tally)
        widths = [site.score_width or LOGIT_WIDTH for site in self.sites]
        if self._reach is None or widths != self._widths:  # a router that replays does not show its scores
            self._reach, self._widths = self._by_expert(widths), widths
            self._bounded_every = self._may_wait(min(widths))
        bounded, own = self.steps % self._bounded_every == 0, 1.0 if self._bounded_every == 1 else 2.0
        for (span, shape), move_L1 in zip(self.layout.runs(), move):
            bias_LE, direction_LE = self.bias[span].view(shape), direction[span].view(shape)
            if bounded:
                moved_LE = step_within(bias_LE, rate * direction_LE, self._reach[span].view(shape), own)
                bias_LE.copy_(torch.where(move_L1, moved_LE, bias_LE))
            else:
                bias_LE.addcmul_(direction_LE, move_L1, value=rate)

    def _may_wait(self, width: float) -> int:
        """
        In how many steps, at most 64, a bias cannot move by more than `width`: so often it is brought back within reach,
        which takes ten times the kernels of a step. Always, where a checkpoint has brought one farther than that makes it.
        """
        longest = 2 * self.config.bias_coef  # of an expert against the mean of its router, by the sign
        # No farther than steps of ours go, rounding aside: else a training that is resumed would wait for others.
        own = 2 * width * (1 + 1e-3)
        far = [bool((self.bias[span] - self.bias[span].mean()).abs().max() > own) for span in self.layout.spans]
        if self.config.rules.bias_rule == "quantile" or any(far):  # read once, at the first step
            return 1
        if self.config.rules.bias_rule == "dual":
            ends = self._potential.grad(torch.tensor([0.0, float(max(self.layout.sizes))], dtype=torch.float64))
            longest = self.config.bias_coef * float(ends[1] - ends[0])
        return max(1, min(64, int(width / longest)))

    def _bias_step(self, tally: StepTally) -> tuple[float, Tensor]:
        """What the rule of the method adds to the biases: a factor, and a direction, flat."""
        rate, rule = self.config.bias_coef, self.config.rules.bias_rule
        if rule == "dual":
            return -rate, self._price_of(self.config.bias_track)
        direction = torch.empty_like(self.bias)
        for span, shape in self.layout.runs():
            load_LE = tally.load[span].view(shape)
            if rule == "sign":  # arXiv 2408.15664, Algorithm 1; of what is not a number the sign is 0
                direction[span] = (load_LE.mean(dim=-1, keepdim=True) - load_LE).sign().view(-1)
            else:
                bias_LE = self.bias[span].view(shape)
                top_k_L1 = self._by_expert([site.top_k for site in self.sites])[span].view(shape)[:, :1]
                width_L1 = self._by_expert([site.score_width or 1.0 for site in self.sites])[span].view(shape)[:, :1]
                target_LE = quantile_bias(tally.margins[span].view(*shape, -1), top_k_L1, bias_LE, width_L1)
                direction[span] = (target_LE - bias_LE).view(-1)
        return rate, direction

    def _held_where_masked(self, step: Tensor, tally: StepTally) -> Tensor:
        """
        `step`, in which experts that no token of the step could choose, having no probability, keep their place among the others.
        Only where the selection is the family's own: it adds the bias to their score of 0 too, and would choose them in the end.
        """
        if not any(site.native_bias for site in self.sites):
            return step
        held = step.clone()
        for span, shape in self.layout.runs():
            step_LE, open_LE = step[span].view(shape), tally.probs[span].view(shape) > 0
            mean_L1 = (step_LE * open_LE).sum(-1, keepdim=True) / open_LE.sum(-1, keepdim=True).clamp(min=1)
            centred_LE = (step_LE - mean_L1) * open_LE
            held[span] = torch.where(open_LE.all(-1, keepdim=True), step_LE, centred_LE).view(-1)
        return held

    def _by_expert(self, values: Sequence[float]) -> Tensor:
        """One value per router, repeated for its experts, flat."""
        return self.bias.new_tensor([value for value, size in zip(values, self.layout.sizes) for _ in range(size)])

    @torch.no_grad()
    def current_toll(self, index: int, sums_E: Tensor) -> Tensor:
        """What router `index` charges, `(E,)`, with the statistic of the step under way mixed in (Algorithm 1)."""
        rate = self.config.ema_rate
        mean = self.means[self.config.track][self.layout.spans[index]].to(sums_E.device)
        mixed = mean.lerp(sums_E / sums_E.sum().clamp(min=1e-30), rate)
        return self.config.coef * centred_price(self._potential, mixed)

    @torch.no_grad()
    def pooled_toll(self, load: Tensor) -> Tensor:
        """
        What every router charges, flat, where all share the price of their pooled tokens, as in transformers'
        `load_balancing_loss_func`: its f sums to k instead of 1, and it is a mean over the L layers instead of a sum.
        """
        pooled_E = load.view(len(self.sites), -1).sum(dim=0)
        price_E = centred_price(self._potential, pooled_E / pooled_E.sum().clamp(min=1e-30))
        return (self.config.coef * self.sites[0].top_k / len(self.sites) * price_E).repeat(len(self.sites))

    @torch.no_grad()
    def charged(self, probs: Tensor, price: Tensor) -> Tensor:
        """coef · Σ_layers ⟨price, mean p⟩ for `probs` summed over tokens, both flat: the value of the balancing term."""
        value = torch.zeros((), device=probs.device)
        for span, shape in self.layout.runs():
            probs_LE = probs[span].view(shape)
            share_LE = probs_LE / probs_LE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            value = value + (share_LE * price[span].view(shape)).sum()
        return self.config.coef * value

    @torch.no_grad()
    def read_native_biases(self) -> None:
        """Takes over native biases that others have set (other weights were loaded); ours keep their fp32 remainder."""
        found = [site.read_native_bias() for site in self.sites]
        if any(bias is not None for bias in found):
            native = torch.cat(
                [
                    self.bias[span] if bias is None else bias.to(self.bias.device)
                    for bias, span in zip(found, self.layout.spans)
                ]
            )
            self.bias.copy_(torch.where(self.bias.to(native.dtype) == native, self.bias, native))

    def _write_native_biases(self) -> None:
        for site, span in zip(self.sites, self.layout.spans):
            site.write_native_bias(self.bias[span])

    @torch.no_grad()
    def set_means(self, sums: Mapping[str, Tensor]) -> None:
        """See [`PhiBalancer.set_means`]."""
        for statistic, mean in self.means.items():
            for span in self.layout.spans:
                total = sums[statistic][span].sum()
                mean[span] = torch.where(total > 0, sums[statistic][span] / total, mean[span].to(total)).to(mean)
        self._set_price()

    @torch.no_grad()
    def set_biases(self, biases: Mapping[str, Tensor]) -> None:
        """See [`PhiBalancer.set_biases`]."""
        for name, span in zip(self.layout.names, self.layout.spans):
            self.bias[span] = biases[name].to(self.bias)
        self._reach = None  # one may be out of reach now
        self.has_bias = self.config.bias_coef > 0 or bool(self.bias.any())
        self._write_native_biases()

    # ------------------------------------------------------------------ persistence

    def state_dict(self) -> dict[str, Tensor]:
        state = {"steps": torch.tensor(self.steps)}
        for statistic, mean in self.means.items():
            state |= {f"{name}.mean_{statistic}": m.cpu() for name, m in self.layout.by_layer(mean).items()}
        if self.has_bias:
            self.read_native_biases()
            state |= {f"{name}.bias": b.cpu() for name, b in self.layout.by_layer(self.bias).items()}
        return state

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Refuses what [`load_state_dict`] cannot take."""
        biased = any(key.endswith(".bias") for key in state)
        check_state(state, self.sites, [f"mean_{statistic}" for statistic in self.means] + ["bias"] * biased)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.check_state_dict(state)
        biased = any(key.endswith(".bias") for key in state)
        for site, span in zip(self.sites, self.layout.spans):
            for statistic, mean in self.means.items():
                mean[span] = state[f"{site.name}.mean_{statistic}"].to(mean)
            if biased:
                self.bias[span] = state[f"{site.name}.bias"].to(self.bias)
        if biased:
            self.has_bias = True
            self._reach = None  # it may bring one out of reach
            self._write_native_biases()
        self.steps = int(state.get("steps", 0))
        self._set_price()

    def take_over(self, other: Duals) -> None:
        """The biases of `other`, the means that both keep, and what follows from them."""
        self.to(other.bias.device)
        for statistic in self.means.keys() & other.means.keys():
            self.means[statistic].copy_(other.means[statistic])
        if other.has_bias:
            other.read_native_biases()
            self.bias.copy_(other.bias)
            self.has_bias, self._reach = True, None
        self.steps = other.steps if self.means.keys() <= other.means.keys() else 0
        self._set_price()
