"""
Naive references on *unpatched* models: what the routers did, and what each balancing method does in its paper.

A reference reads the logits and choices of every router, builds the paper's loss, and lets autograd differentiate it.
For a bias it replaces the router's forward.
"""

import contextlib
import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------- what the routers did


def routers(model):
    return {
        name: module for name, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")
    }


@contextlib.contextmanager
def routed(model):
    """Context manager: yields `{router name: [(logits, chosen)]}` of the forwards inside it."""
    seen = {name: [] for name in routers(model)}
    handles = [
        router.register_forward_hook(lambda module, args, out, name=name: seen[name].append((out[0], out[2])))
        for name, router in routers(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


@dataclass
class Routed:
    """One router in one micro-batch. Shapes: B rows of S tokens, T = B·S, E experts, k of them per token."""

    logits: torch.Tensor  # (T, E), part of the graph
    chosen: torch.Tensor  # (T, k)
    mask: torch.Tensor  # (B, S), True for the tokens that count
    sigmoid: bool

    @property
    def affinities(self):
        return self.logits.sigmoid() if self.sigmoid else self.logits.softmax(-1)

    @property
    def probs(self):
        """(T, E), rows sum to one: the softmax, or the normalised affinities s' of arXiv 2412.19437, eq. 19."""
        return self.affinities / self.affinities.sum(-1, keepdim=True)

    @functools.cached_property
    def counts(self):
        """Assignments per expert over the counted tokens, (E,)."""
        found = Counter(self.chosen[self.mask.flatten()].flatten().tolist())
        return torch.tensor([found[e] for e in range(self.logits.shape[-1])], dtype=torch.float64)

    def mean_probs(self):
        """P of arXiv 2101.03961, eq. 6, over the counted tokens, (E,)."""
        return self.probs[self.mask.flatten()].double().mean(0)


def forward(model, batch, token_mask="attention_mask"):
    """Returns the loss of the task, and `{router name: Routed}`."""
    mask = batch["labels"] != -100 if token_mask == "labels" else batch["attention_mask"].bool()
    sigmoid = model.config.model_type == "deepseek_v3"
    with routed(model) as seen:
        loss = model(**batch).loss
    return loss, {name: Routed(*outputs[-1], mask, sigmoid) for name, outputs in seen.items()}


# ---------------------------------------------------------------------- losses
# Each takes the micro-batches so far in the step, `[{router name: Routed}]`, and returns the loss of the last one.


def share(counts):
    return counts / counts.sum()


def switch_loss(so_far):
    """E Σ_e f_e P_e per layer (Switch, arXiv 2101.03961, eqs. 4-6; ST-MoE, arXiv 2202.08906), f of this micro-batch."""
    return sum(len(r.counts) * (share(r.counts) * r.mean_probs()).sum() for r in so_far[-1].values())


def global_batch_loss(so_far):
    """As Switch, f of all micro-batches so far (arXiv 2501.11873, with the buffer of its algorithm 1)."""
    total = 0.0
    for name, r in so_far[-1].items():
        counts = sum(micro_batch[name].counts for micro_batch in so_far)
        total = total + len(counts) * (share(counts) * r.mean_probs()).sum()
    return total


def pooled_loss(so_far):
    """E Σ_e f_e P_e over the tokens of all layers pooled, f summing to k, as in `load_balancing_loss_func`."""
    layers = list(so_far[-1].values())
    tokens = sum(int(r.mask.sum()) for r in layers)
    f = sum(r.counts for r in layers) / tokens
    p = sum(r.probs[r.mask.flatten()].double().sum(0) for r in layers) / tokens
    return len(f) * (f * p).sum()


def z_loss(so_far):
    """mean over tokens of (log Σ exp z)² per layer (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return sum(r.logits[r.mask.flatten()].double().logsumexp(-1).square().mean() for r in so_far[-1].values())


def sequence_loss(so_far):
    """
    Σ_e f_e P_e of each sequence (DeepSeek-V3, arXiv 2412.19437, eqs. 17-20), f = E/(k T) Σ_t 1(in the top-k of the
    unbiased affinities), and the mean over sequences weighted by their tokens.
    """
    total = 0.0
    for r in so_far[-1].values():
        rows, width = r.mask.shape
        experts, k = r.logits.shape[-1], r.chosen.shape[-1]
        affinities, mask, probs = r.affinities.tolist(), r.mask.flatten().tolist(), r.probs.double()
        for row in range(rows):
            kept = [t for t in range(row * width, (row + 1) * width) if mask[t]]
            counts = [0] * experts
            for t in kept:
                for e in sorted(range(experts), key=lambda e: -affinities[t][e])[:k]:
                    counts[e] += 1
            f = torch.tensor([experts / (k * len(kept)) * count for count in counts], dtype=torch.float64)
            p = probs[kept].mean(0)
            total = total + len(kept) / int(r.mask.sum()) * (f * p).sum()
    return total


# ∇φ per expert at the relative load r, up to a constant
SLOPES = {
    "neg_entropy": lambda r: math.log(r) + 1,
    "l2": lambda r: r,
    "l3": lambda r: r**2 / 2,
    "log_cosh": lambda r: math.tanh(r - 1),
}


def phi_loss(means, price_from, potential="neg_entropy", rate=0.3, track="probs"):
    """⟨∇φ(E·m), P⟩ per layer (arXiv 2605.15403, algorithm 1), m with the statistic s mixed in: (1 − η) m + η s."""

    def loss(so_far):
        total = 0.0
        for name, r in so_far[-1].items():
            statistics = [
                r.probs[r.mask.flatten()].detach().double().sum(0) if track == "probs" else r.counts
                for r in (m[name] for m in (so_far if price_from == "global" else so_far[-1:]))
            ]
            mean = means[name].double()
            if price_from != "previous":
                mean = (1 - rate) * mean + rate * share(sum(statistics))
            price = torch.tensor([SLOPES[potential](len(mean) * m) for m in mean.tolist()], dtype=torch.float64)
            total = total + (price * r.mean_probs()).sum()
        return total

    return loss


def price_loss(prices):
    """Σ over routers of the mean over tokens of ⟨q, p⟩ in a micro-batch, for given prices q by router name."""
    return lambda so_far: sum((r.probs[r.mask.flatten()] @ prices[name]).mean() for name, r in so_far[-1].items())


LOSSES = {"switch": switch_loss, "pooled": pooled_loss, "global_batch": global_batch_loss}
EXTRAS = {"z_loss_coef": z_loss, "sequence_coef": sequence_loss}


# ---------------------------------------------------------------------- biases


def select_with(router, bias):
    """Makes an unpatched router select with `bias`: by its own buffer, or by replacing Mixtral's forward."""
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.copy_(bias)
        return

    def forward(hidden):
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        probs = logits.softmax(-1)
        chosen = (probs + bias).topk(router.top_k).indices
        values = probs.gather(-1, chosen)
        return logits, values / values.sum(-1, keepdim=True), chosen

    router.forward = forward


def start_with(model, bias):
    """Sets the native bias of an unpatched model."""
    for router in routers(model).values():
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(bias)


def loss_free_step(bias, counts, rate):
    """b_e ← b_e + u · sign(c̄ − c_e) (arXiv 2408.15664, algorithm 1)."""
    fair = sum(counts) / len(counts)
    return [b + rate * ((fair > c) - (fair < c)) for b, c in zip(bias, counts)]


def quantile_bounds(scores, bias, k):
    """
    Quantile balancing: returns the two order statistics of (cutoff − score) around the k/E quantile of each expert.

    Args: scores (T, E) of the counted tokens, T divisible by E/k; bias (E,). cutoff: the (k+1)-th largest s + b.
    """
    tokens, experts = scores.shape
    assert tokens * k % experts == 0
    cutoff = (scores + bias).sort(-1, descending=True).values[:, k]
    ordered = (cutoff[:, None] - scores).sort(0).values  # (T, E)
    rank = tokens * k // experts  # number of tokens that may choose an expert
    return ordered[rank - 1], ordered[rank]


# ---------------------------------------------------------------------- φ-balancing as a whole


def probabilities(model, logits):
    if model.config.model_type == "deepseek_v3":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    return logits.softmax(-1)


def naive_training(model, steps, config, lr):
    """
    The definition as a plain SGD loop over an *unpatched* model: the price term is part of the loss, the duals follow
    from the recorded router outputs. Trains `model` in place. Returns the duals after each step.
    """
    experts = model.config.num_local_experts
    coef, rate = config.coef, config.ema_rate
    uniform = torch.full((experts,), 1 / experts, dtype=torch.float64)
    means = {name: {"probs": uniform, "load": uniform} for name in routers(model)}
    prices = {name: torch.zeros(experts) for name in means}
    biases = {name: torch.zeros(experts, dtype=torch.float64) for name in means}
    history = []

    def price_of(mean):
        price = (experts * mean).log() + 1  # ∇φ of the negative entropy, at the relative load
        return price - price.mean()

    for micro_batches in steps:
        labels_of_step = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        tokens_of_step = sum(batch["attention_mask"].sum() for batch in micro_batches)
        statistics = {name: {"probs": 0.0, "load": 0.0} for name in means}
        for batch in micro_batches:
            with routed(model) as seen:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            targets = batch["labels"][:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") / labels_of_step
            counted = batch["attention_mask"].reshape(-1).bool()
            for name, ((router_logits, chosen),) in seen.items():
                probs = probabilities(model, router_logits)[counted]
                loss = loss + coef * (probs @ prices[name]).sum() / tokens_of_step
                counts = Counter(chosen[counted].flatten().tolist())
                statistics[name]["probs"] += probs.detach().double().sum(0)
                statistics[name]["load"] += torch.tensor([counts[e] for e in range(experts)], dtype=torch.float64)
            loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= lr * param.grad
                    param.grad = None
        for name, sums in statistics.items():
            for kind, total in sums.items():
                means[name] = means[name] | {kind: (1 - rate) * means[name][kind] + rate * total / total.sum()}
            prices[name] = price_of(means[name][config.track]).float()
            if config.bias_coef > 0:
                biases[name] = biases[name] - config.bias_coef * price_of(means[name][config.bias_track])
                select_with(routers(model)[name], biases[name].float())
        kept = {
            kind: {name: means[name][kind].float() for name in means} for kind in (config.track, config.bias_track)
        }
        history.append({"means": kept, "prices": dict(prices), "biases": {n: b.float() for n, b in biases.items()}})
    return history


def naive_figures(loads):
    """Computes some of the logged metrics from `{layer: counts}`."""
    figures = {"max_vio": [], "entropy": [], "gini": []}
    dead = 0
    for counts in loads.values():
        share = [count * len(counts) / sum(counts) for count in counts]
        dead += sum(r < 0.05 for r in share)
        figures["max_vio"].append(max(share) - 1)
        figures["entropy"].append(
            -sum(r / len(share) * math.log(r / len(share)) for r in share if r) / math.log(len(share))
        )
        figures["gini"].append(sum(abs(a - b) for a in share for b in share) / (2 * len(share) ** 2))
    result = {name: sum(values) / len(values) for name, values in figures.items()}
    result |= {"max_vio_worst_layer": max(figures["max_vio"]), "dead_experts": dead}
    return result | {f"max_vio/{name}": value for name, value in zip(loads, figures["max_vio"])}
