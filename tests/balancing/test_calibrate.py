"""Means and biases from a few batches: against sums in float64, the training that follows, and two real ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from charging import collect
from checks import assert_same
from invariance import in_ranks
from references import forward, routers
from steps import build, difference, micro_batches, step_gradient
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


pytestmark = pytest.mark.slow


FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")
BOTH = {"coef": 1.0, "bias_coef": 0.003}


def texts(model, count=4, first=0):
    return [tiny_batch(model, 5, 12, seed=seed) for seed in range(first, first + count)]


@torch.no_grad()
def naive_means(model, batches):
    """`{statistic: {router: share}}` of an unpatched model in eval mode, all tokens weighing the same, in float64."""
    model = copy.deepcopy(model).eval()
    seen = [forward(model, batch)[1] for batch in batches]
    means = {"probs": {}, "load": {}}
    for name in seen[0]:
        probs = sum(r[name].probs[r[name].mask.flatten()].double().sum(0) for r in seen)
        load = sum(r[name].counts for r in seen)
        means["probs"][name], means["load"][name] = probs / probs.sum(), load / load.sum()
    return means


@pytest.mark.parametrize("model_type", FAMILIES)
def test_means_are_those_of_all_tokens(model_type):
    model = build(model_type)
    batches = micro_batches(model, ((2, 8), (3, 6), (5, 10)))  # unequal, so a mean of means would be another
    expected = naive_means(model, batches)
    phb.patch(model, BOTH)
    balancer = phb.get_balancer(model)
    figures = phb.calibrate(model, iter(batches))
    for statistic, means in expected.items():
        for name, mean in balancer.means(statistic).items():
            torch.testing.assert_close(mean.double(), means[name], rtol=1e-5, atol=1e-6)
    counted = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert figures.tokens == counted
    for name, load in figures.loads.items():
        torch.testing.assert_close(load / load.sum(), expected["load"][name])


def test_first_step_pays_the_prices_of_the_means():
    """q = log(E m), centred, where a cold start pays nothing."""
    batches = texts(tiny_model("mixtral"))
    cold, warm = (phb.patch(build("mixtral"), {"coef": 1.0}) for _ in range(2))
    phb.calibrate(warm, batches)
    for name, price in phb.get_balancer(warm).prices().items():
        m = naive_means(build("mixtral"), batches)["probs"][name]
        torch.testing.assert_close(price.double(), (8 * m).log() - (8 * m).log().mean(), rtol=1e-4, atol=1e-5)
    first = [batches[0]]
    plain = step_gradient(build("mixtral"), first)
    assert_same(step_gradient(cold, first), plain)
    prices = phb.get_balancer(warm).prices()
    added = difference(step_gradient(warm, first), plain)
    naive = build("mixtral")
    seen = forward(naive, first[0])[1]
    charged = sum((prices[name].double() * r.mean_probs()).sum() for name, r in seen.items())
    charged.backward()
    for name in routers(naive):
        torch.testing.assert_close(
            added[f"{name}.weight"], naive.get_parameter(f"{name}.weight").grad, rtol=1e-3, atol=1e-4
        )


def test_nothing_else_changes():
    model = phb.patch(build("mixtral"), BOTH)
    balancer, before = phb.get_balancer(model), {name: p.clone() for name, p in model.state_dict().items()}
    random, biases = torch.get_rng_state(), balancer.biases()
    phb.calibrate(model, texts(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(dict(model.state_dict()), before)
    assert_same(balancer.biases(), biases)
    assert balancer.steps == 0 and model.training and not collect(model)
    assert not any(load.any() for load in balancer.loads().values())


@pytest.mark.parametrize("model_type", [*FAMILIES, "llama4_text", "granitemoe"])
def test_bias_evens_out_the_loads(model_type):
    """Sigmoids with a bias of the family's own, in groups; probabilities; logits. Counted by an evaluation afterwards."""
    model = phb.patch(tiny_model(model_type), BOTH)
    balancer, batches = phb.get_balancer(model), [tiny_batch(model, 16, 24, seed=seed) for seed in range(4)]
    start = phb.calibrate(model, batches)
    figures = phb.calibrate(model, batches, bias=True)
    with balancer.evaluation(), torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
        counted = balancer.eval_metrics()
    assert counted["max_vio"] == pytest.approx(figures.max_vio_global, rel=1e-4)
    assert figures.max_vio_global < 0.12 < 0.25 < start.max_vio_global
    for name, mean in balancer.means("load").items():  # of the loads under the bias
        torch.testing.assert_close(
            mean.double(), figures.loads[name] / figures.loads[name].sum(), rtol=1e-5, atol=1e-6
        )


def test_bias_starts_from_the_one_in_force():
    """None of the passes is needed where the loads are even already; a bias of zero they are not even with."""
    model = phb.patch(tiny_model("mixtral"), BOTH)
    batches = [tiny_batch(model, 16, 24, seed=seed) for seed in range(2)]
    phb.calibrate(model, batches, bias=True)
    balancer = phb.get_balancer(model)
    found, even = balancer.biases(), phb.calibrate(model, batches).max_vio_global
    assert phb.calibrate(model, batches, bias=True, iterations=1).max_vio_global == even
    assert_same(balancer.biases(), found)


def test_what_cannot_be_calibrated():
    model = phb.patch(build("mixtral"), {"coef": 0.01})
    with pytest.raises(ValueError, match="bias=True, but `bias_coef` is 0"):
        phb.calibrate(model, texts(model), bias=True)
    with pytest.raises(ValueError, match="hold no token that counts"):
        phb.calibrate(model, [])
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.calibrate(build("mixtral"), [])
    step_gradient(model, texts(model), close=False)
    with pytest.raises(RuntimeError, match="call this between two steps"):
        phb.calibrate(model, texts(model))


# ---------------------------------------------------------------------- real ranks


def on_each_rank():
    """Each rank has texts of its own, of unequal length."""
    rank = dist.get_rank()
    model = phb.patch(tiny_model("mixtral"), BOTH)
    batches = texts(model, 1 + rank, first=rank)
    figures = phb.calibrate(model, batches, bias=True, iterations=3)
    state = {name: part.numpy() for name, part in phb.get_balancer(model).state_dict().items()}
    report = phb.fold(model, batches)
    weights = {name: router.weight.detach().numpy() for name, router in routers(model).items()}
    return {"state": state, "weights": weights, "r2": report.r2, "tokens": figures.tokens}


def test_two_ranks_find_what_one_process_finds():
    first, second = in_ranks(on_each_rank, 2)
    model = phb.patch(tiny_model("mixtral"), BOTH)
    batches = texts(model, 3)
    tokens = phb.calibrate(model, batches, bias=True, iterations=3).tokens
    state = phb.get_balancer(model).state_dict()
    assert first["tokens"] == second["tokens"] == tokens
    for name, part in state.items():
        assert (first["state"][name] == second["state"][name]).all()
        torch.testing.assert_close(torch.as_tensor(first["state"][name]), part, rtol=1e-4, atol=1e-5)
    report = phb.fold(model, batches)
    assert first["r2"] == pytest.approx(report.r2, rel=1e-4)
    for name, router in routers(model).items():
        assert (first["weights"][name] == second["weights"][name]).all()
        torch.testing.assert_close(torch.as_tensor(first["weights"][name]), router.weight, rtol=1e-3, atol=1e-4)
