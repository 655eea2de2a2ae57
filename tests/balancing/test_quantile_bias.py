"""Quantile balancing against sorted margins: the bias, the loads that it makes, and what it refuses."""

import pytest
import torch
from references import forward, quantile_bounds, routers, select_with
from steps import build, build_for, many_tokens, step_gradient

import hf_phibalance as phb


SCORE_SPAN = {"mixtral": 1.0, "deepseek_v3": 1.0, "qwen3_moe": 1.0}
HISTOGRAM_BINS = 1000  # of the histogram, over twice the span of the scores and the range of the bias


def ungrouped(model_type):
    return build_for({"method": "quantile"}, model_type)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        step_gradient(model, [batch])
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
        balancer.set_biases(dict.fromkeys(balancer.layer_names, start))
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
