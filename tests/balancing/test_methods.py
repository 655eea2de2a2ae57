"""
Every balancing method, and the two extra losses, against a naive transcription of its formula.

A reference sees an *unpatched* model: it reads the logits and the choice of every router, builds the loss of its paper
with autograd, and leaves the derivative to torch. What a patched model adds to the task gradient has to be that.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tiny import ROUTER, set_prices, tiny_batch, tiny_model
from training import assert_same, make_trainer, routers, rows, select_with
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import hf_phibalance as phb
from hf_phibalance import PhiBalanceConfig


METHODS = ("phi", "switch", "pooled", "global_batch", "loss_free", "quantile", "frozen", "none")
COEF = 2.0  # large, so that float32 resolves what is added to the task gradient
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
CHECKPOINTING = {"none": None, "non_reentrant": False, "reentrant": True}
SHAPES = ((2, 8), (3, 6), (2, 10))  # rows and width of the micro-batches of a step; later rows are shorter


# ---------------------------------------------------------------------- what a router did


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
    """Loss of the task, and `{router name: Routed}`."""
    seen, handles = {}, []
    mask = batch["labels"] != -100 if token_mask == "labels" else batch["attention_mask"].bool()
    for name, router in routers(model).items():

        def note(module, args, output, name=name):
            seen[name] = Routed(output[0], output[2], mask, model.config.model_type == "deepseek_v3")

        handles.append(router.register_forward_hook(note))
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    return loss, seen


# ---------------------------------------------------------------------- naive references
# Each takes the micro-batches of the step so far, `[{router name: Routed}]`, and returns the loss of the last one.


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
    """E Σ_e f_e P_e, the tokens of all layers in one pool, f summing to k; as `load_balancing_loss_func`."""
    layers = list(so_far[-1].values())
    tokens = sum(int(r.mask.sum()) for r in layers)
    f = sum(r.counts for r in layers) / tokens
    p = sum(r.probs[r.mask.flatten()].double().sum(0) for r in layers) / tokens
    return len(f) * (f * p).sum()


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
        rows_, width = r.mask.shape
        experts, k = r.logits.shape[-1], r.chosen.shape[-1]
        affinities, mask, probs = r.affinities.tolist(), r.mask.flatten().tolist(), r.probs.double()
        for row in range(rows_):
            kept = [t for t in range(row * width, (row + 1) * width) if mask[t]]
            counts = [0] * experts
            for t in kept:
                for e in sorted(range(experts), key=lambda e: -affinities[t][e])[:k]:
                    counts[e] += 1
            f = torch.tensor([experts / (k * len(kept)) * count for count in counts], dtype=torch.float64)
            p = probs[kept].mean(0)
            total = total + len(kept) / int(r.mask.sum()) * (f * p).sum()
    return total


def loss_free_step(bias, counts, rate):
    """b_e ← b_e + u · sign(c̄ − c_e) (arXiv 2408.15664, algorithm 1)."""
    fair = sum(counts) / len(counts)
    return [b + rate * ((fair > c) - (fair < c)) for b, c in zip(bias, counts)]


def quantile_bounds(scores, bias, k):
    """
    Quantile balancing: between which two order statistics of (cutoff − score) the k/E quantile of each expert lies.

    Args: scores (T, E) of the counted tokens, T divisible by E/k; bias (E,). cutoff: the (k+1)-th largest s + b.
    """
    tokens, experts = scores.shape
    assert tokens * k % experts == 0
    cutoff = (scores + bias).sort(-1, descending=True).values[:, k]
    ordered = (cutoff[:, None] - scores).sort(0).values  # (T, E)
    rank = tokens * k // experts  # so many tokens may choose an expert
    return ordered[rank - 1], ordered[rank]


# ---------------------------------------------------------------------- gradients of a step


def micro_batches(model, shapes=SHAPES, seed=0):
    return [tiny_batch(model, *shape, seed=seed + i) for i, shape in enumerate(shapes)]


UNGROUPED = {"n_group": 1, "topk_group": 1}  # DeepSeek-V3 first drops half of its groups


def build(model_type, checkpointing="none", **overrides):
    model = tiny_model(model_type, **overrides).train()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    return model


def build_for(config, model_type, **overrides):
    """As `build`; quantile balancing refuses groups."""
    grouped = model_type == "deepseek_v3" and config.get("method") == "quantile"
    return build(model_type, **(UNGROUPED if grouped else {}), **overrides)


def collect(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_gradient(model, batches, announce=None, close=True):
    """Gradient of an optimizer step of the task, with what a patch adds."""
    model.zero_grad()
    balancer = phb.get_balancer(model) if is_patched(model) else None
    if balancer is not None:
        balancer.begin_step(batches if announce is None else announce)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    if balancer is not None and close:
        balancer.step()
    return collect(model)


def is_patched(model):
    return "_phi_balance_patch" in vars(model)


def loss_gradient(model, batches, losses, shares=None, token_mask="attention_mask"):
    """Gradient of Σ_j share_j Σ coef · loss(micro-batches 1..j) on an unpatched model; `losses` is `[(coef, loss)]`."""
    assert not is_patched(model)
    model.zero_grad()
    routed = [forward(model, batch, token_mask)[1] for batch in batches]
    tokens = [int(next(iter(r.values())).mask.sum()) for r in routed]
    shares = [count / sum(tokens) for count in tokens] if shares is None else shares
    total = 0.0
    for j, part in enumerate(shares):
        for coef, loss in losses:
            total = total + part * coef * loss(routed[: j + 1])
    total.backward()
    return collect(model)


def difference(left, right):
    return {name: left[name] - right[name] if name in right else left[name] for name in left}


def assert_gradient(actual, expected, tolerance=1e-4, parts=(True, False)):
    """Of the routers (True), and of everything below them (False): the relative residual is that of float32."""
    for part in parts:
        names = [name for name in expected if bool(ROUTER.search(name)) is part]
        assert names
        zeros = {name: torch.zeros_like(expected[name]) for name in names}
        left, right = (
            torch.cat([{**zeros, **grads}[name].double().flatten() for name in names]) for grads in (actual, expected)
        )
        assert right.norm() > 1e-2
        assert (left - right).norm() <= tolerance * right.norm(), (part, left.norm(), right.norm())
    beyond = actual.keys() - expected.keys()
    assert all(actual[name].abs().max() < 1e-4 for name in beyond), beyond


def added_gradient(model, config, batches, prepare=None, announce=None):
    """What the patch adds to the task gradient; `model` is left patched."""
    plain = step_gradient(model, batches)
    phb.patch(model, config)
    if prepare is not None:
        prepare(model)
    return difference(step_gradient(model, batches, announce), plain)


EXTRAS = {"z_loss_coef": z_loss, "sequence_coef": sequence_loss}
EXTRA_COEF = {"z_loss_coef": 0.1, "sequence_coef": 2.0}
LOSSES = {"switch": switch_loss, "pooled": pooled_loss, "global_batch": global_batch_loss}


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", LOSSES)
def test_gradient_of_a_loss(method, model_type):
    batches = micro_batches(build(model_type))
    added = added_gradient(build(model_type), {"method": method, "coef": COEF}, batches)
    assert_gradient(added, loss_gradient(build(model_type), batches, [(COEF, LOSSES[method])]))


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("method", LOSSES)
def test_gradient_of_a_loss_under_checkpointing(method, checkpointing):
    batches = micro_batches(build("qwen3_moe"))
    added = added_gradient(build("qwen3_moe", checkpointing), {"method": method, "coef": COEF}, batches)
    assert_gradient(added, loss_gradient(build("qwen3_moe"), batches, [(COEF, LOSSES[method])]))


def test_the_losses_differ():
    """Guards the tests above: on these micro-batches no reference stands for another."""
    model = build("mixtral")
    batches = micro_batches(model)
    gradients = [loss_gradient(model, batches, [(COEF, loss)]) for loss in LOSSES.values()]
    for i, left in enumerate(gradients):
        for right in gradients[:i]:
            with pytest.raises(AssertionError):
                assert_gradient(left, right, tolerance=1e-2)


@pytest.mark.parametrize("method", LOSSES)
def test_losses_over_the_labelled_tokens(method):
    model = build("mixtral")
    batches = micro_batches(model)
    for batch in batches:
        batch["labels"][:, :3] = -100
    added = added_gradient(model, {"method": method, "coef": COEF, "token_mask": "labels"}, batches)
    reference = [(COEF, LOSSES[method])]
    assert_gradient(added, loss_gradient(build("mixtral"), batches, reference, token_mask="labels"))


@pytest.mark.parametrize("method", LOSSES)
def test_losses_where_only_the_number_of_micro_batches_is_known(method):
    """Then each micro-batch has the same share of the step."""
    model = build("mixtral")
    batches = micro_batches(model)
    added = added_gradient(model, {"method": method, "coef": COEF}, batches, announce=len(batches))
    shares = [1 / len(batches)] * len(batches)
    assert_gradient(added, loss_gradient(build("mixtral"), batches, [(COEF, LOSSES[method])], shares))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_pooled_is_the_loss_of_transformers(model_type):
    model = build(model_type)
    (batch,) = micro_batches(model, [(3, 9)])
    assert 0 < batch["attention_mask"].sum() < batch["attention_mask"].numel()

    def published(so_far):
        logits = tuple(r.logits for r in so_far[-1].values())
        return load_balancing_loss_func(logits, model.config.num_local_experts, 2, batch["attention_mask"])

    expected = loss_gradient(model, [batch], [(COEF, published)])
    assert_gradient(added_gradient(model, {"method": "pooled", "coef": COEF}, [batch]), expected)


def test_the_built_in_loss_does_not_come_on_top():
    model = build("mixtral", router_aux_loss_coef=1.0, output_router_logits=True)
    (batch,) = micro_batches(model, [(3, 9)])
    plain = step_gradient(build("mixtral"), [batch])
    phb.patch(model, {"method": "pooled", "coef": COEF})
    added = difference(step_gradient(model, [batch]), plain)
    assert_gradient(added, loss_gradient(build("mixtral"), [batch], [(COEF, pooled_loss)]))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", LOSSES)
def test_the_logged_loss_is_the_value_of_the_formula(method, checkpointing):
    """Less its value at balance, which charges nothing."""
    model = build("mixtral", checkpointing)
    batches = micro_batches(model)
    phb.patch(model, {"method": method, "coef": COEF})
    step_gradient(model, batches)
    with torch.no_grad():
        routed = [forward(build("mixtral"), batch)[1] for batch in batches]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    values = [float(LOSSES[method](routed[: j + 1])) for j in range(len(batches))]
    at_balance = 2 if method == "pooled" else len(routed[0])
    expected = COEF * (sum(n * value for n, value in zip(tokens, values)) / sum(tokens) - at_balance)
    assert phb.get_balancer(model).metrics()["balance_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", LOSSES)
def test_all_losses_together_through_a_gradient_scaler(method, checkpointing):
    model, scale = build("deepseek_v3", checkpointing), 1024.0
    batches = micro_batches(model)
    plain = step_gradient(model, batches)
    phb.patch(model, {"method": method, "coef": COEF, **EXTRA_COEF})
    model.zero_grad()
    phb.get_balancer(model).begin_step(batches, loss_scale=scale)
    for batch in batches:
        (scale * model(**batch).loss / len(batches)).backward()
    phb.get_balancer(model).step()
    added = difference({name: grad / scale for name, grad in collect(model).items()}, plain)
    losses = [(COEF, LOSSES[method]), *((EXTRA_COEF[extra], EXTRAS[extra]) for extra in EXTRAS)]
    assert_gradient(added, loss_gradient(build("deepseek_v3"), batches, losses))


@pytest.mark.parametrize("method", LOSSES)
def test_several_forwards_before_one_backward(method):
    """Each micro-batch pays what it was told in its own forward."""
    model = build("mixtral")
    batches = micro_batches(model)
    plain = step_gradient(model, batches)
    phb.patch(model, {"method": method, "coef": COEF})
    model.zero_grad()
    phb.get_balancer(model).begin_step(batches)
    (sum(model(**batch).loss for batch in batches) / len(batches)).backward()
    added = difference(collect(model), plain)
    assert_gradient(added, loss_gradient(build("mixtral"), batches, [(COEF, LOSSES[method])]))


@pytest.mark.parametrize("method", ["loss_free", "quantile", *LOSSES])
def test_models_in_bfloat16(method):
    """Gradients are those of the formula on the same model, up to its precision."""
    model = build("mixtral", dtype=torch.bfloat16)
    batches = micro_batches(model)
    phb.patch(model, {"method": method})
    plain = step_gradient(model, batches)
    phb.unpatch(model)
    strong = {"coef": 20.0} if method in LOSSES else {}
    phb.patch(model, {"method": method, **strong, "z_loss_coef": 1.0, "sequence_coef": 20.0})
    added = difference(step_gradient(model, batches), plain)
    losses = [(20.0, LOSSES[method])] if method in LOSSES else []
    reference = build("mixtral", dtype=torch.bfloat16)
    assert_gradient(added, loss_gradient(reference, batches, [*losses, (1.0, z_loss), (20.0, sequence_loss)]), 0.03)


def test_global_batch_of_one_micro_batch_is_switch():
    model = build("mixtral")
    batches = micro_batches(model, [(3, 9)])
    gradients = []
    for method in ("switch", "global_batch"):
        phb.patch(model, {"method": method, "coef": COEF})
        gradients.append(step_gradient(model, batches))
    assert_same(*gradients)


def test_global_batch_begins_anew_with_each_step():
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"method": "global_batch", "coef": COEF})
    first = step_gradient(model, batches)
    step_gradient(model, micro_batches(model, seed=10))
    assert_same(step_gradient(model, batches), first)


@pytest.mark.parametrize("method", ["switch", "pooled", "global_batch"])
def test_a_step_that_is_given_up_leaves_nothing(method):
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"method": method, "coef": COEF})
    first = step_gradient(model, batches)
    step_gradient(model, micro_batches(model, seed=10), close=False)
    phb.get_balancer(model).discard_step()
    assert_same(step_gradient(model, batches), first)


def test_an_evaluation_between_micro_batches_is_not_part_of_the_step():
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"method": "global_batch", "coef": COEF})
    straight = step_gradient(model, batches)
    model.zero_grad()
    phb.get_balancer(model).begin_step(batches)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
        with torch.no_grad():
            model.eval()(**tiny_batch(model, 4, 8, seed=99))
        model.train()
    phb.get_balancer(model).step()
    assert_same(collect(model), straight)


# ---------------------------------------------------------------------- φ, and when its price is taken


@pytest.mark.parametrize("price_from", ["previous", "current", "global"])
@pytest.mark.parametrize(
    ("model_type", "potential", "track"),
    [
        ("mixtral", "neg_entropy", "probs"),
        ("qwen3_moe", "l3", "load"),
        ("deepseek_v3", "l2", "probs"),
        ("gpt_oss", "log_cosh", "load"),
    ],
)
def test_gradient_of_phi(model_type, potential, track, price_from):
    config = {"coef": COEF, "price_from": price_from, "potential": potential, "track": track, "ema_rate": 0.4}
    means = {}

    def prepare(model):
        means.update(set_prices(model).means())

    batches = micro_batches(build(model_type))
    added = added_gradient(build(model_type), config, batches, prepare)
    assert min((mean - 1 / len(mean)).abs().max() for mean in means.values()) > 0.1
    loss = phi_loss(means, price_from, potential, 0.4, track)
    assert_gradient(added, loss_gradient(build(model_type), batches, [(COEF, loss)]))


@pytest.mark.parametrize("price_from", ["current", "global"])
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_gradient_of_phi_under_checkpointing(checkpointing, price_from):
    means = {}
    batches = micro_batches(build("mixtral"))
    config = {"coef": COEF, "price_from": price_from, "ema_rate": 0.7}
    added = added_gradient(
        build("mixtral", checkpointing), config, batches, lambda model: means.update(set_prices(model).means())
    )
    loss = phi_loss(means, price_from, rate=0.7)
    assert_gradient(added, loss_gradient(build("mixtral"), batches, [(COEF, loss)]))


def test_the_times_of_the_price_differ():
    """Guards the tests above."""
    model = build("mixtral")
    batches = micro_batches(model)
    means = phb.get_balancer(phb.patch(model)).means()
    means = {name: torch.softmax(torch.arange(8.0) / 4, -1) for name in means}
    phb.unpatch(model)
    gradients = [
        loss_gradient(model, batches, [(COEF, phi_loss(means, price_from))])
        for price_from in ("previous", "current", "global")
    ]
    for i, left in enumerate(gradients):
        for right in gradients[:i]:
            with pytest.raises(AssertionError):
                assert_gradient(left, right, tolerance=1e-2)


@pytest.mark.parametrize("price_from", ["previous", "current", "global"])
def test_means_move_alike_whenever_the_price_is_taken(price_from):
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"coef": COEF, "price_from": price_from, "ema_rate": 0.4})
    before = set_prices(model).means()
    step_gradient(model, batches)
    routed = [forward(build("mixtral"), batch)[1] for batch in batches]
    for name, mean in phb.get_balancer(model).means().items():
        s = share(sum(r[name].probs[r[name].mask.flatten()].detach().double().sum(0) for r in routed))
        torch.testing.assert_close(mean.double(), 0.6 * before[name].double() + 0.4 * s, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------- biases


def start_with(model, bias):
    """Gives an unpatched model with a native bias that bias."""
    for router in routers(model).values():
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(bias)


@torch.no_grad()
def counted(model, batches):
    """Logits of the model, and `{router: assignments}` over `batches`."""
    totals, logits = {}, []
    for batch in batches:
        handle = model.register_forward_hook(lambda module, args, output: logits.append(output.logits))
        _, seen = forward(model, batch)
        handle.remove()
        for name, r in seen.items():
            totals[name] = totals.get(name, 0) + r.counts
    return logits, totals


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_loss_free_follows_the_sign_of_the_counts(model_type):
    """Three steps; the naive model selects with the naive bias, so that equal outputs also mean unbiased weights."""
    model, naive = build(model_type), build(model_type)
    start = torch.linspace(-0.01, 0.01, 8) if model_type == "deepseek_v3" else torch.zeros(8)
    start_with(model, start)
    unbiased = build(model_type)
    biases = {name: start.tolist() for name in routers(naive)}
    phb.patch(model, {"method": "loss_free", "bias_coef": 0.03})
    balancer = phb.get_balancer(model)
    moved = 0
    for step in range(3):
        batches = micro_batches(model, seed=10 * step)
        for name, router in routers(naive).items():
            with torch.no_grad():
                select_with(router, torch.tensor(biases[name]))
        logits, counts = counted(naive, batches)
        moved += any(not torch.equal(counts[name], counted(unbiased, batches)[1][name]) for name in counts)
        with torch.no_grad():
            for batch, expected in zip(batches, logits):
                torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        model.train()
        step_gradient(model, batches)
        assert {name: load.tolist() for name, load in balancer.loads().items()} == {
            name: count.tolist() for name, count in counts.items()
        }
        biases = {name: loss_free_step(biases[name], counts[name].tolist(), 0.03) for name in biases}
        for name, bias in balancer.biases().items():
            torch.testing.assert_close(bias, torch.tensor(biases[name]), rtol=0, atol=1e-6)
    assert moved == (3 if model_type == "deepseek_v3" else 2)  # a bias of zero selects as no bias does
    if model_type == "deepseek_v3":
        for name, router in routers(model).items():
            torch.testing.assert_close(router.e_score_correction_bias, torch.tensor(biases[name]), rtol=0, atol=1e-6)


def test_loss_free_leaves_an_expert_of_the_fair_load_alone():
    """The sign of 0 is 0. All counts are made equal, but for two."""
    model = build("mixtral", num_hidden_layers=1)
    phb.patch(model, {"method": "loss_free", "bias_coef": 0.5})
    balancer = phb.get_balancer(model)
    state = balancer.state_dict()
    (name,) = balancer.layer_names
    found = False
    for seed in range(200):
        batch = tiny_batch(model, 2, 8, padded=False, seed=seed)
        before = balancer.biases()[name]
        step_gradient(model, [batch])
        load = balancer.loads()[name]
        fair = load == 4
        assert load.sum() == 32
        torch.testing.assert_close(balancer.biases()[name] - before, 0.5 * torch.sign(4 - load))
        found |= bool(0 < fair.sum() < 8)
        balancer.load_state_dict(state)
        if found:
            break
    assert found


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", ["switch", "global_batch"])
def test_the_bias_beside_a_switch_price_follows_the_excess_load(method, model_type):
    """b <- b - bias_coef (E f - 1), f of the whole step, while the gradient stays that of the loss."""
    model = build(model_type)
    start = phb.get_balancer(phb.patch(build(model_type), {"coef": 0.0})).biases()
    biases = {name: bias.double() for name, bias in start.items()}
    phb.patch(model, {"method": method, "coef": COEF, "bias_coef": 0.03})
    balancer = phb.get_balancer(model)
    for step in range(3):
        step_gradient(model, micro_batches(model, seed=10 * step))
        for name, load in balancer.loads().items():
            biases[name] -= 0.03 * (load.double() * len(load) / load.sum() - 1)
            torch.testing.assert_close(balancer.biases()[name].double(), biases[name], rtol=0, atol=1e-6)
    unbiased, batches = build(model_type), micro_batches(model)
    added = difference(
        step_gradient(phb.patch(build(model_type), {"method": method, "coef": COEF, "bias_coef": 0.03}), batches),
        step_gradient(build(model_type), batches),
    )
    assert_gradient(added, loss_gradient(unbiased, batches, [(COEF, LOSSES[method])]))


@pytest.mark.parametrize("method", ["loss_free", "quantile"])
def test_biases_add_no_gradient(method):
    model = build("qwen3_moe")
    batches = micro_batches(model)
    plain = step_gradient(model, batches)
    phb.patch(model, {"method": method})
    assert_same(step_gradient(model, batches), plain)  # the bias is still zero
    assert any(bias.abs().max() > 0 for bias in phb.get_balancer(model).biases().values())


# ---------------------------------------------------------------------- quantile balancing

SCORE_SPAN = {"mixtral": 1.0, "deepseek_v3": 1.0, "qwen3_moe": 1.0}
HISTOGRAM_BINS = 1000  # of the histogram, over twice the span of the scores and the range of the bias


def ungrouped(model_type):
    return build_for({"method": "quantile"}, model_type)


def many_tokens(model, seed=0):
    """One padded micro-batch whose tokens are a multiple of 8 experts / top-2, so that a fair share is whole."""
    batch = tiny_batch(model, 16, 64, seed=seed)
    while batch["attention_mask"].sum() % 4:
        row = int(batch["attention_mask"].sum(1).argmax())
        last = int(batch["attention_mask"][row].sum()) - 1
        batch["attention_mask"][row, last] = 0
        batch["labels"][row, last] = -100
    return batch


@torch.no_grad()
def naive_bounds(model, batch, biases, k=2):
    """Bounds of the k/E quantiles of every router, given the bias in force; `model` is unpatched and selects with it."""
    bounds = {}
    for name, router in routers(model).items():
        select_with(router, biases[name])
    _, seen = forward(model, batch)
    for name, r in seen.items():
        scores = r.affinities[r.mask.flatten()].double()
        bounds[name] = quantile_bounds(scores, biases[name].double(), k)
    return bounds


def assert_quantile(bias, bounds, bin_width):
    """`bias` is centred, and up to that each expert's lies between the two order statistics, give or take a bin."""
    low, high = bounds
    assert abs(float(bias.sum())) < 1e-5
    middle, slack = (low + high) / 2, (high - low) / 2
    error = (bias - (middle - middle.mean())).abs()
    assert (error <= slack + slack.mean() + bin_width).all(), (error, slack, bin_width)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_quantile_is_that_of_the_sorted_margins(model_type):
    """Two steps: the second with the bias of the first in force."""
    model, naive = ungrouped(model_type), ungrouped(model_type)
    phb.patch(model, {"method": "quantile"})
    balancer = phb.get_balancer(model)
    for seed in range(2):
        before = balancer.biases()
        batch = many_tokens(model, seed)
        assert (batch["attention_mask"] == 0).sum() > 0
        step_gradient(model, [batch])
        bounds = naive_bounds(naive, batch, before)
        for name, bias in balancer.biases().items():
            spread = float(before[name].max() - before[name].min())
            assert_quantile(bias.double(), bounds[name], (2 * SCORE_SPAN[model_type] + spread) / HISTOGRAM_BINS)
            assert bias.abs().max() > 0.02


@pytest.mark.parametrize("model_type", ["gpt_oss", "kolibri1"])
def test_quantile_of_logits(model_type):
    """These rank logits, which have no bound: the quantile is that of the logits, up to 1 % of their range."""
    model, naive = build(model_type), build(model_type)
    phb.patch(model, {"method": "quantile"})
    batch = many_tokens(model)
    step_gradient(model, [batch])
    with torch.no_grad():
        _, seen = forward(naive, batch)
    for name, bias in phb.get_balancer(model).biases().items():
        logits = seen[name].logits[seen[name].mask.flatten()].double()
        bounds = quantile_bounds(logits, torch.zeros(8, dtype=torch.float64), 2)
        assert_quantile(bias.double(), bounds, 0.01 * float(logits.max() - logits.min()))
        assert bias.abs().max() > 0.3


# one for each way in which the ranked scores are found
RANKING = (
    "mixtral",  # softmax
    "gpt_oss",  # logits
    "flint",  # sigmoid
    "deepseek_v3",  # sigmoid, native bias
    "ernie4_5_moe",  # softmax, native bias
    "deepseek_v4",  # square root of softplus, native bias
    "kolibri1",  # logits, native bias
    "longcat_flash",  # with identity experts
    "dbrx",  # in the parent
    "jetmoe",
    "llama4_text",
    "gemma4_text",
    "cohere2_moe",
)


@pytest.mark.parametrize("model_type", RANKING)
def test_quantile_makes_the_loads_of_the_same_batch_fair(model_type):
    """The first router sees the same tokens again; the iteration has all but settled after four steps."""
    model = ungrouped(model_type)
    batch = many_tokens(model)
    phb.patch(model, {"method": "quantile"})
    balancer = phb.get_balancer(model)
    first = balancer.layer_names[0]
    violations = []
    for _ in range(5):
        model(**batch)
        balancer.step()
        load = balancer.loads()[first]
        violations.append(float(load.max() / load.mean()) - 1)
    assert violations[0] > 0.25
    assert violations[1] < 0.75 * violations[0], violations
    assert violations[4] < 0.3 * violations[0], violations


def test_quantile_bias_coef_is_the_fraction_moved():
    model, batch = build("mixtral"), many_tokens(build("mixtral"))
    start = torch.linspace(-0.1, 0.1, 8)
    ends = {}
    for rate in (1.0, 0.25):
        phb.patch(model, {"method": "quantile", "bias_coef": rate})
        balancer = phb.get_balancer(model)
        state = balancer.state_dict()
        for name in balancer.layer_names:
            state[f"{name}.bias"] = start.clone()
        balancer.load_state_dict(state)
        step_gradient(model, [batch])
        ends[rate] = balancer.biases()
        phb.unpatch(model)
    for name, whole in ends[1.0].items():
        torch.testing.assert_close(ends[0.25][name], 0.75 * start + 0.25 * whole, rtol=0, atol=1e-6)
        assert (whole - start).abs().max() > 0.05


def test_quantile_counts_no_padding():
    """Other tokens under the padding, and more of it, change nothing."""
    biases = []
    for extra, filler in ((0, 0), (12, 7)):
        model = build("mixtral")
        batch = many_tokens(model)
        columns = {"input_ids": filler, "attention_mask": 0, "labels": -100}
        batch = {
            name: torch.cat([tensor, torch.full((len(tensor), extra), columns[name])], 1)
            for name, tensor in batch.items()
        }
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)
        batch = {name: tensor[:, :64] if extra == 0 else tensor for name, tensor in batch.items()}
        phb.patch(model, {"method": "quantile"})
        step_gradient(model, [batch])
        biases.append(phb.get_balancer(model).biases())
    for name, bias in biases[0].items():
        torch.testing.assert_close(biases[1][name], bias, rtol=0, atol=2e-5)


def dealt(batch, sizes):
    """`batch` row by row in several micro-batches, all of its width."""
    start = 0
    for size in sizes:
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}
        start += size


@pytest.mark.parametrize("method", ["loss_free", "quantile"])
def test_biases_do_not_depend_on_the_split(method):
    biases = []
    for sizes in ((16,), (8, 8), (1, 5, 7, 3)):
        model = build("mixtral")
        phb.patch(model, {"method": method})
        step_gradient(model, list(dealt(many_tokens(model), sizes)))
        biases.append(phb.get_balancer(model).biases())
    for other in biases[1:]:
        for name, bias in biases[0].items():
            torch.testing.assert_close(other[name], bias, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["loss_free", "quantile"])
def test_a_router_that_samples_its_experts_is_refused(method):
    model = build("phimoe")
    before = dict(vars(model))
    with pytest.raises(ValueError, match="sparsemixer samples the experts"):
        phb.patch(model, {"method": method})
    assert vars(model) == before


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [("mixtral", {"num_experts_per_tok": 8}, "8 of 8 experts"), ("deepseek_v3", {}, "within groups")],
)
def test_quantiles_that_say_nothing_are_refused(model_type, overrides, reason):
    """No token has a (k+1)-th expert; or the cutoff is not that of all experts."""
    model = build(model_type, **overrides)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=f"'quantile'.*{reason}"):
        phb.patch(model, {"method": "quantile"})
    assert vars(model) == before


# ---------------------------------------------------------------------- frozen, none


def router_parameters(model):
    return {name: p for name, p in model.named_parameters() if ROUTER.search(name)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_frozen_routers_get_no_gradient_and_the_rest_its_own(model_type):
    model = build(model_type)
    batches = micro_batches(model)
    plain = step_gradient(model, batches)
    phb.patch(model, {"method": "frozen"})
    frozen = step_gradient(model, batches)
    names = set(router_parameters(model))
    assert names and not names & set(frozen)
    assert_same(frozen, {name: grad for name, grad in plain.items() if name not in names})
    assert phb.get_balancer(model).steps == 1 and all(
        load.sum() > 0 for load in phb.get_balancer(model).loads().values()
    )
    phb.unpatch(model)
    assert_same(step_gradient(model, batches), plain)


def test_unpatch_restores_what_was_frozen_before():
    model = build("mixtral")
    params = list(router_parameters(model).values())
    params[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for config in ({"method": "frozen"}, {"method": "none"}, {"method": "frozen"}):
        phb.patch(model, config)
        expected = [False] * len(params) if config["method"] == "frozen" else [False] + [True] * (len(params) - 1)
        assert [p.requires_grad for p in params] == expected
    phb.unpatch(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("model_type", FAMILIES)
def test_none_only_counts(model_type):
    model = build(model_type)
    batches = micro_batches(model)

    def losses_and_gradients():
        losses = [model(**batch).loss.detach() for batch in batches]
        return losses, step_gradient(model, batches)

    losses, plain = losses_and_gradients()
    routed = [forward(model, batch)[1] for batch in batches]
    phb.patch(model, {"method": "none"})
    again, gradient = losses_and_gradients()
    assert all(torch.equal(*pair) for pair in zip(losses, again))
    assert_same(gradient, plain)
    balancer = phb.get_balancer(model)
    for name, load in balancer.loads().items():
        assert load.tolist() == sum(r[name].counts for r in routed).tolist()
    assert not any(bias.any() for bias in balancer.biases().values())


# ---------------------------------------------------------------------- extra losses


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_of_an_extra_loss(model_type, extra):
    batches = micro_batches(build(model_type))
    added = added_gradient(build(model_type), {"method": "none", extra: EXTRA_COEF[extra]}, batches)
    expected = loss_gradient(build(model_type), batches, [(EXTRA_COEF[extra], EXTRAS[extra])])
    assert_gradient(added, expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_losses_do_not_depend_on_the_split(extra, checkpointing):
    """Nor on recomputation: whole sequences dealt to 3 and 6 micro-batches, against the formula of one."""
    whole = tiny_batch(build("mixtral"), 6, 10)
    expected = loss_gradient(build("mixtral"), [whole], [(EXTRA_COEF[extra], EXTRAS[extra])])
    for sizes in ((3, 1, 2), (1,) * 6):
        model = build("mixtral", checkpointing)
        config = {"coef": 0.0, extra: EXTRA_COEF[extra]}
        assert_gradient(added_gradient(model, config, list(dealt(whole, sizes))), expected)


@pytest.mark.parametrize("method", METHODS)
def test_extra_losses_come_on_top_of_any_method(method):
    model = build_for({"method": method}, "deepseek_v3")
    batches = micro_batches(model)
    strength = {"coef": COEF} if method in ("phi", *LOSSES) else {}
    gradients = []
    for extras in ({}, EXTRA_COEF):
        phb.patch(model, {"method": method, **strength, **extras})
        if method == "phi":
            set_prices(model)
        gradients.append(step_gradient(model, batches))
        phb.unpatch(model)
        start_with(model, torch.zeros(8))
    added = difference(*reversed(gradients))
    reference = build_for({"method": method}, "deepseek_v3")
    if method == "frozen":
        assert not set(router_parameters(model)) & set(gradients[1])
        for p in router_parameters(reference).values():
            p.requires_grad_(False)
    expected = loss_gradient(reference, batches, [(EXTRA_COEF[extra], EXTRAS[extra]) for extra in EXTRAS])
    assert_gradient(added, expected, parts=(False,) if method == "frozen" else (True, False))


def test_sequence_loss_takes_the_unbiased_choice():
    """A bias that sends every token to two experts does not change f."""
    model, naive = build("mixtral"), build("mixtral")
    batches = micro_batches(model)
    bias = torch.zeros(8)
    bias[:2] = 50.0
    for router in routers(naive).values():
        select_with(router, bias)
    gradients = []
    for config in ({"method": "loss_free"}, {"method": "loss_free", "sequence_coef": 2.0}):
        phb.patch(model, config)
        balancer = phb.get_balancer(model)
        balancer.load_state_dict(
            {"steps": torch.tensor(1)}
            | {f"{name}.bias": bias for name in balancer.layer_names}
            | {key: value for key, value in balancer.state_dict().items() if ".mean_" in key}
        )
        gradients.append(step_gradient(model, batches))
        assert all(load[:2].sum() == load.sum() for load in balancer.loads().values())
        phb.unpatch(model)
    assert_gradient(difference(gradients[1], gradients[0]), loss_gradient(naive, batches, [(2.0, sequence_loss)]))


@pytest.mark.parametrize(
    "config", [{"method": "switch"}, *({"method": "none", name: 0.1} for name in EXTRAS)], ids=str
)
def test_a_loss_that_reaches_nothing_is_refused(config):
    model = build("mixtral")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    phb.patch(model, config)
    name = next((name for name in EXTRAS if name in config), "coef")
    with pytest.raises(ValueError, match=f"{name}=.*no gradient path leads from any router"):
        step_gradient(model, micro_batches(model))


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", True, None])
def test_extra_losses_refuse_what_is_no_strength(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        PhiBalanceConfig(**{name: value})


# ---------------------------------------------------------------------- configuration

# Fields of φ that a method reads, and their values by default
READS = {
    "switch": {"coef": 0.01, "bias_coef": 0.0},
    "pooled": {"coef": 0.001},
    "global_batch": {"coef": 0.01, "bias_coef": 0.0},
    "loss_free": {"bias_coef": 0.001},
    "quantile": {"bias_coef": 1.0},
    "frozen": {},
    "none": {},
}
OTHERS = {
    "coef": [0.0, 0.5],
    "bias_coef": [0.0, 0.5],
    "potential": ["neg_entropy", "l2", "softplus"],
    "potential_kwargs": [{"delta": 2.0}],
    "ema_rate": [0.3, 0.77, 1.0],
    "track": ["probs", "load"],
    "bias_track": ["probs", "load"],
    "price_from": ["previous", "current", "global"],
}


def test_all_methods_are_listed():
    assert tuple(sorted(phb.METHODS)) == tuple(sorted(METHODS))
    assert PhiBalanceConfig().method == "phi" and set(READS) == set(METHODS) - {"phi"}


@pytest.mark.parametrize("method", READS)
def test_published_strengths_are_the_defaults(method):
    config = PhiBalanceConfig(method=method)
    for name in ("coef", "bias_coef"):
        assert getattr(config, name) == READS[method].get(name, 0.0)
        if name in READS[method]:
            assert getattr(PhiBalanceConfig(method=method, **{name: 0.25}), name) == 0.25


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("method", READS)
def test_a_field_that_the_method_does_not_read_is_refused(method, field):
    own = getattr(PhiBalanceConfig(method=method), field)
    assert getattr(PhiBalanceConfig(method=method, **{field: own}), field) == own
    others = [value for value in OTHERS[field] if value != own]
    assert others
    for value in others:
        if field in READS[method]:
            if (method, value) != ("quantile", 0.0):
                assert getattr(PhiBalanceConfig(method=method, **{field: value}), field) == value
            continue
        with pytest.raises(ValueError, match=f"`{field}`") as error:
            PhiBalanceConfig(method=method, **{field: value})
        assert field == "potential_kwargs" or (method in str(error.value) and repr(value) in str(error.value))


@pytest.mark.parametrize("value", ["Phi", "", None, True, ["phi"], "aux_free"])
def test_an_unknown_method_is_refused(value):
    with pytest.raises(ValueError, match="`method` must be one of") as error:
        PhiBalanceConfig(method=value)
    assert repr(value) in str(error.value) and all(repr(method) in str(error.value) for method in METHODS)


@pytest.mark.parametrize("value", [1.5, 0.0])
def test_quantile_moves_by_a_fraction(value):
    with pytest.raises(ValueError, match=r"`bias_coef`.*\(0, 1\]"):
        PhiBalanceConfig(method="quantile", bias_coef=value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_the_round_trip(method, tmp_path):
    strengths = dict.fromkeys(READS.get(method, {"coef", "bias_coef"}), 0.125)
    for config in (
        PhiBalanceConfig(method=method),
        PhiBalanceConfig(method=method, z_loss_coef=1e-3, sequence_coef=1e-4, token_mask="labels", **strengths),
    ):
        values = json.loads(json.dumps(config.to_dict()))
        assert values["method"] == method and None not in values.values()
        assert PhiBalanceConfig.from_dict(values) == config == copy.deepcopy(config)
        assert PhiBalanceConfig.load(config.save(tmp_path)) == config
        assert dataclasses.replace(config, z_loss_coef=0.5).z_loss_coef == 0.5


def test_a_config_without_a_method_is_phi():
    old = {
        "coef": 0.02,
        "bias_coef": 0.001,
        "potential": "tsallis",
        "potential_kwargs": {"alpha": 1.5},
        "ema_rate": 0.5,
        "track": "load",
        "bias_track": "load",
        "price_from": "current",
        "token_mask": "all",
        "version": "0.1.0",
    }
    config = PhiBalanceConfig.from_dict(old)
    assert config.method == "phi" and config.z_loss_coef == config.sequence_coef == 0
    assert {name: getattr(config, name) for name in old if name != "version"} == {
        name: value for name, value in old.items() if name != "version"
    }


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_plain_finite_numbers(method):
    model = build("qwen3_moe")
    phb.patch(model, {"method": method, **EXTRA_COEF})
    for seed in range(2):
        step_gradient(model, micro_batches(model, seed=10 * seed))
        metrics = phb.get_balancer(model).metrics()
        assert json.loads(json.dumps(metrics)) == metrics
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["max_vio"] > 0 and metrics["tokens"] > 0


# ---------------------------------------------------------------------- in and out of a model


def trace(model):
    hooks = [
        [type(hook).__name__ for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        for m in model.modules()
    ]
    return (
        hooks,
        set(vars(model)),
        model.config.to_dict(),
        {name: p.requires_grad for name, p in model.named_parameters()},
        [set(vars(m)) for m in model.modules()],
        list(model.state_dict()),
    )


@pytest.mark.parametrize(
    ("method", "model_type"),
    [*zip(METHODS, itertools.cycle(FAMILIES)), ("loss_free", "deepseek_v3"), ("quantile", "deepseek_v3")],
)
def test_unpatch_leaves_no_trace(method, model_type):
    model = build_for({"method": method}, model_type)
    batches = micro_batches(model)
    plain, before = step_gradient(model, batches), trace(model)
    phb.patch(model, {"method": method, **EXTRA_COEF})
    step_gradient(model, batches)
    assert trace(model) != before
    phb.unpatch(model)
    start_with(model, torch.zeros(8))  # a native bias stays as trained
    assert trace(model) == before
    assert_same(step_gradient(model, batches), plain)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_another_method_goes_on_from_the_bias_in_force(model_type):
    """The weights were trained with that selection; methods without a bias of their own neither move nor lose it."""
    model = build(model_type)
    batches = micro_batches(model)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.05})
    step_gradient(model, batches)
    biases = phb.get_balancer(model).biases()
    assert all(bias.abs().max() > 2e-3 for bias in biases.values())
    phb.patch(model, {"method": "loss_free", "bias_coef": 0.001})
    assert_same(phb.get_balancer(model).biases(), biases)
    step_gradient(model, batches)
    for name, bias in phb.get_balancer(model).biases().items():
        assert 0 < (bias - biases[name]).abs().max() < 0.0011
    moved = phb.get_balancer(model).biases()
    for config in ({"method": "switch"}, {"method": "none"}, {"method": "global_batch"}, {"coef": 0.1}):
        phb.patch(model, config)
        assert_same(phb.get_balancer(model).biases(), moved)
        step_gradient(model, batches)
        assert_same(phb.get_balancer(model).biases(), moved)


@pytest.mark.parametrize("method", ["switch", "pooled", "global_batch"])
def test_a_loss_without_memory_is_the_same_after_another_method(method):
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"method": method, "coef": COEF})
    fresh = step_gradient(model, batches)
    phb.unpatch(model)
    phb.patch(model, {"coef": COEF, "track": "load"})
    set_prices(model)
    phb.patch(model, {"method": method, "coef": COEF})
    assert_same(step_gradient(model, batches), fresh)


@pytest.mark.parametrize("method", METHODS)
def test_phi_after_another_method_has_its_means(method):
    """Those of φ are carried over; the others leave the uniform one, or the share of what they have counted."""
    model = build("mixtral")
    phb.patch(model, {"method": method})
    step_gradient(model, micro_batches(model))
    before = phb.get_balancer(model).means() if method == "phi" else None
    phb.patch(model, {"coef": COEF})
    for name, mean in phb.get_balancer(model).means().items():
        torch.testing.assert_close(mean.sum(), torch.tensor(1.0))
        assert before is None or torch.equal(mean, before[name])
    step_gradient(model, micro_batches(model, seed=10))
    assert all(torch.isfinite(price).all() and price.any() for price in phb.get_balancer(model).prices().values())


# ---------------------------------------------------------------------- resuming

RUNS = {
    **{method: {"method": method} for method in METHODS},
    "phi_global": {"price_from": "global", "bias_coef": 0.02},
    "phi_hard": {"price_from": "current", "track": "load"},
    "switch_and_bias": {"method": "switch", "bias_coef": 0.02},
    "quantile_averaged": {"method": "quantile", "bias_coef": 0.3},
}


def train(model, steps, start=0, lr=0.05):
    for step in range(start, start + steps):
        step_gradient(model, micro_batches(model, SHAPES[:2], seed=100 * step))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= lr * p.grad


@pytest.mark.parametrize(
    ("model_type", "run"),
    [("mixtral", run) for run in RUNS] + [("deepseek_v3", run) for run in ("loss_free", "quantile", "phi_global")],
)
def test_resumed_training_is_bitwise_the_same(model_type, run, tmp_path):
    config = {**RUNS[run], **EXTRA_COEF}
    straight = phb.patch(build_for(config, model_type), config)
    train(straight, 2)
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    phb.get_balancer(straight).save(tmp_path)
    train(straight, 2, start=2)
    resumed = build_for(config, model_type, seed=1)
    resumed.load_state_dict(weights)
    phb.patch(resumed, config)
    phb.get_balancer(resumed).load(tmp_path)
    train(resumed, 2, start=2)
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    assert_same(phb.get_balancer(resumed).state_dict(), phb.get_balancer(straight).state_dict())
    assert phb.get_balancer(resumed).steps == 4


@pytest.mark.parametrize("method", ["pooled", "quantile", "frozen"])
def test_a_saved_model_comes_back_with_its_method(method, tmp_path):
    model = phb.patch(build("mixtral"), {"method": method, **EXTRA_COEF})
    batches = micro_batches(model)
    step_gradient(model, batches)
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=True).train()
    assert phb.get_balancer(loaded).config == phb.get_balancer(model).config
    assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
    assert_same(step_gradient(loaded, batches), step_gradient(model, batches))


# ---------------------------------------------------------------------- inside a Trainer


def test_a_trainer_takes_the_declared_step(tmp_path):
    """One SGD step of 3 accumulated micro-batches: the weights move by the task gradient and that of the formula."""
    lr, data = 0.1, rows(6)
    moved, fed = {}, {}
    for method in ("none", *LOSSES):
        model = phb.patch(build("mixtral"), {"method": method} | ({"coef": COEF} if method in LOSSES else {}))
        trainer = make_trainer(
            model, tmp_path, data=data, max_steps=1, gradient_accumulation_steps=3, learning_rate=lr
        )
        phb.attach(trainer)
        noted = fed[method] = []

        def note(module, args, kwargs, noted=noted):
            noted.append({key: kwargs[key] for key in ("input_ids", "attention_mask", "labels")})

        model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.train()
        moved[method] = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
    for method, loss in LOSSES.items():
        assert len(fed[method]) == 3
        added = {key: (moved["none"][key] - moved[method][key]) / lr for key in moved[method]}
        assert_gradient(added, loss_gradient(build("mixtral"), fed[method], [(COEF, loss)]), tolerance=1e-3)


# ---------------------------------------------------------------------- two ranks

ON_RANKS = {
    "switch": ({"method": "switch", "coef": COEF}, switch_loss),
    "pooled": ({"method": "pooled", "coef": COEF}, pooled_loss),
    "global_batch": ({"method": "global_batch", "coef": COEF}, global_batch_loss),
    "phi_current": ({"coef": COEF, "price_from": "current"}, "current"),
    "phi_global": ({"coef": COEF, "price_from": "global"}, "global"),
    "z_loss": ({"method": "none", "z_loss_coef": 0.1}, z_loss),
    "sequence": ({"method": "none", "sequence_coef": 2.0}, sequence_loss),
    "loss_free": ({"method": "loss_free", "bias_coef": 0.01}, None),
    "quantile": ({"method": "quantile"}, None),
}
COUNTED_OVER_RANKS = ("global_batch", "phi_global")


def batches_of_rank(model, rank):
    return micro_batches(model, SHAPES[:2] if rank == 0 else SHAPES[1:], seed=50 * rank)


def on_each_rank():
    results = {}
    for case, (config, _) in ON_RANKS.items():
        for checkpointing in ("none", "reentrant") if case in COUNTED_OVER_RANKS else ("none",):
            model = build("mixtral", checkpointing)
            batches = batches_of_rank(model, dist.get_rank())
            plain = step_gradient(model, batches)
            phb.patch(model, config)
            if case.startswith("phi"):
                set_prices(model)
            added = difference(step_gradient(model, batches), plain)
            for grad in added.values():
                dist.all_reduce(grad)
            results[f"{case}_{checkpointing}"] = {
                "gradient": {name: (grad / dist.get_world_size()).numpy() for name, grad in added.items()},
                "biases": {name: bias.numpy() for name, bias in phb.get_balancer(model).biases().items()},
            }
    return results


def test_two_ranks():
    """Gradients averaged over the ranks, and biases, are those of the formula over both ranks."""
    by_rank = run_ranks(on_each_rank, 2)
    model = build("mixtral")
    by_turn = list(zip(batches_of_rank(model, 0), batches_of_rank(model, 1)))
    everything = [batch for turn in by_turn for batch in turn]
    means = phb.get_balancer(phb.patch(model)).means()
    means = set_prices(model).means()
    phb.unpatch(model)
    for case, (config, loss) in ON_RANKS.items():
        keys = [f"{case}_{mode}" for mode in ("none", "reentrant") if f"{case}_{mode}" in by_rank[0]]
        if loss is None:
            balancer = phb.get_balancer(phb.patch(model, config))
            step_gradient(model, everything)
            for results in by_rank:
                for name, bias in balancer.biases().items():
                    assert bias.abs().max() > 1e-3
                    torch.testing.assert_close(
                        torch.from_numpy(results[keys[0]]["biases"][name]), bias, atol=2e-5, rtol=0
                    )
            phb.unpatch(model)
            continue
        formula = phi_loss(means, loss) if isinstance(loss, str) else loss
        expected = loss_gradient_of_turns(model, by_turn, config, formula, case in COUNTED_OVER_RANKS)
        for key in keys:
            for results in by_rank:
                gradient = {name: torch.from_numpy(grad) for name, grad in results[key]["gradient"].items()}
                assert_gradient(gradient, expected)


def loss_gradient_of_turns(model, by_turn, config, formula, over_ranks):
    """As `loss_gradient`, for micro-batches that the ranks run side by side."""
    coef = next(value for name, value in config.items() if name.endswith("coef"))
    model.zero_grad()
    turns = [[forward(model, batch)[1] for batch in turn] for turn in by_turn]
    tokens = sum(int(next(iter(r.values())).mask.sum()) for turn in turns for r in turn)
    total = 0.0
    for j, turn in enumerate(turns):
        for own in turn:
            others = [r for earlier in turns[:j] for r in earlier] + [r for r in turn if r is not own]
            so_far = [*(others if over_ranks else []), own]
            total = total + int(next(iter(own.values())).mask.sum()) / tokens * coef * formula(so_far)
    total.backward()
    return collect(model)
