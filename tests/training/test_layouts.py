"""
Real processes: models that transformers spreads over ranks, uneven batches, ranks that step alone. The coefficient is exact in
all of them, and pipelines are noticed.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from invariance import in_ranks
from layouts import LAYOUTS, measure_layouts, save_models
from spread import LOCAL_STEPS, RUNS, TRAINERS, WITH_IDLE_EXPERTS, batches_of_ranks, on_two_ranks, whole_rows
from steps import assert_gradient
from tiny import tiny_model
from training import make_trainer, pad

import hf_phibalance as phb


pytestmark = pytest.mark.slow


# With PHB_EXAMPLES all of them. Models with a norm per head (Qwen3-MoE) are not exact under tensor parallelism: transformers 5.24
# leaves those norms a part of their gradient, patched or not.
LONGER = "PHB_EXAMPLES" in os.environ
SHORT = ("TP, EP by all-reduce", "FSDP2, EP", "FSDP2 × TP, EP over all")
WANTED = [layout for layout in LAYOUTS if LONGER or layout.name in SHORT]
TWO_RANKS, FOUR_RANKS = ([layout.name for layout in WANTED if layout.ranks == ranks] for ranks in (2, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, ["mixtral"])
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder):
    return in_ranks(on_two_ranks, 2, TWO_RANKS, str(folder))


def assert_exact(results, names, trainers):
    assert [(r.layout, r.trainer) for r in results] == [(name, trainer) for name in names for trainer in trainers]
    for result in results:
        assert result.ratio == pytest.approx(1, abs=1e-5), result
        assert result.residual < 1e-5, result
        assert result.counted == 1, result


def test_spread_over_two_ranks(two_ranks):
    """Ranks that share tokens, or experts, or both: the coefficient is the declared one, and each token counts once."""
    for results in two_ranks:
        assert_exact(results["layouts"], TWO_RANKS, TRAINERS)


def test_spread_over_four_ranks(folder):
    """In a loop only: a `Trainer` takes long to import four times."""
    trainers = TRAINERS if LONGER else TRAINERS[:1]
    for results in in_ranks(measure_layouts, 4, FOUR_RANKS, trainers, str(folder), "mixtral"):
        assert_exact(results, FOUR_RANKS, trainers)


# ---------------------------------------------------------------------- batches that are not even


def tensors(arrays):
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def definition(model, batch, prices):
    """Gradient of coef · Σ_layers mean_tokens ⟨q, p⟩ over the whole `batch`, on a plain model."""
    logits = {}
    for name in prices:
        model.get_submodule(name).register_forward_hook(lambda _, a, out, name=name: logits.update({name: out[0]}))
    model(**batch)
    counted = batch["attention_mask"].flatten().bool()
    term = sum((logits[name].softmax(-1)[counted] @ torch.from_numpy(q)).mean() for name, q in prices.items())
    (5.0 * term).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("run", RUNS)
def test_uneven_batches(two_ranks, run):
    by_step = list(zip(*(results["uneven"][run] for results in two_ranks)))
    assert len(by_step) > 1
    for steps_of_ranks in by_step[1:]:  # the first has no prices yet
        (_, prices, _), *_ = steps_of_ranks
        batch = pad([{"input_ids": ids} for _, _, seen in steps_of_ranks for rows in seen for ids in rows])
        expected = definition(tiny_model("mixtral").train(), batch, prices)
        for added, _, _ in steps_of_ranks:
            assert_gradient(tensors(added), expected)


def test_the_batches_are_uneven(two_ranks):
    """Rows of each micro-batch of the last step, by rank."""
    last = {run: [[len(rows) for rows in results["uneven"][run][-1][2]] for results in two_ranks] for run in RUNS}
    assert last == {
        "repeated": [[2], [2]],
        "uneven": [[2], [1]],
        "uneven steps": [[2, 1], [2]],
        "drop_last": [[2], [2]],
        "tokens of each device": [[2], [2]],
    }


# ---------------------------------------------------------------------- steps of their own


def test_ranks_that_step_alone(two_ranks):
    """A group of one: weights and duals of each rank are those of the naive loop on its own batches."""
    for results in two_ranks:
        found = results["local"]
        assert found["moved"] > 1e-2
        assert found["far"] < 1e-5
        assert found["own"]["steps"] == LOCAL_STEPS
        for kind in ("means", "biases"):
            suffix = {"means": "mean_probs", "biases": "bias"}[kind]
            for name, value in found[kind].items():
                np.testing.assert_allclose(found["own"][f"{name.removeprefix('model.')}.{suffix}"], value, atol=1e-5)
    prices = [results["local"]["prices"] for results in two_ranks]
    assert any(np.abs(prices[0][name] - prices[1][name]).max() > 1e-2 for name in prices[0])


def test_averaged_duals_are_loaded(two_ranks):
    """After an averaging of weights: q = ∇φ of the averaged mean, the same on every rank."""
    both = [results["local"] for results in two_ranks]
    for name in both[0]["means"]:
        mean = (both[0]["means"][name] + both[1]["means"][name]) / 2
        price = np.log(len(mean) * mean)
        for found in both:
            np.testing.assert_allclose(found["averaged means"][name], mean, atol=1e-5)
            np.testing.assert_allclose(found["averaged prices"][name], price - price.mean(), atol=1e-4)


def test_experts_without_a_token_on_a_rank(two_ranks):
    """FSDP2 shards the experts of a layer as one parameter: no rank waits for another, with prices or without."""
    assert two_ranks[1]["idle experts"]["idle"] >= 4
    model = tiny_model("mixtral", **WITH_IDLE_EXPERTS).train()
    batches = batches_of_ranks(model)
    batch = pad([{"input_ids": ids} for batch in batches for ids in batch["input_ids"].tolist()])
    expected = definition(model, batch, two_ranks[0]["idle experts"]["prices"])
    for results in two_ranks:
        assert_gradient(tensors(results["idle experts"]["added"]), expected)


def test_parts_of_rows_in_a_loop(two_ranks):
    """Context parallelism written out (torch's has no kernels for the CPU): begin_step() gets the parts."""
    model = tiny_model("mixtral", num_key_value_heads=4).train()
    ids = whole_rows(model)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for results in two_ranks:
        found = results["parts"]
        assert found["tokens"] == ids.numel()
        assert_gradient(tensors(found["added"]), definition(model, batch, found["prices"]))
        model.zero_grad()


# ---------------------------------------------------------------------- what is refused


REFUSALS = {
    "stage of transformers": ["ValueError: pp_size=2 leaves on each rank a part of the routers", "without pp_size"],
    "other strength": [
        "ValueError: the ranks of this optimizer step have different routers or configurations",
        "coef=",
    ],
    "other layers": ["ValueError: the ranks of this optimizer step have different routers", "whole model"],
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_on_every_rank(two_ranks, what):
    for results in two_ranks:
        assert all(part in (results[what] or "") for part in REFUSALS[what]), results[what]


def test_a_pipeline_is_noticed_on_every_rank(two_ranks):
    """Its stages run layers without the backbone, so nothing is balanced. A warning says so."""
    for results in two_ranks:
        said, steps = results["pipelining"]
        assert steps == 0
        assert [line for line in said if "pipelining, which φ-balancing does not support" in line]


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_parts_of_rows_are_refused_in_a_trainer(name, tmp_path, monkeypatch):
    trainer = make_trainer(phb.patch(tiny_model("mixtral")), tmp_path)
    monkeypatch.setattr(trainer, f"get_{name}", lambda: 2)
    with pytest.raises(ValueError, match=f"{name}=2: ranks hold parts of the same rows"):
        phb.attach(trainer)


def test_choices_numbered_anew_on_each_rank_are_refused():
    """A model as the expert parallelism of transformers up to 5.20 makes it."""
    model = tiny_model("mixtral")
    model._ep_plan = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)
    phb.unpatch(phb.patch(model))  # not spread over anything
    model._device_mesh = object()
    with pytest.raises(ValueError, match="'ep_router', which numbers a router's choice anew"):
        phb.patch(model)
    model.config.distributed_config.enable_expert_parallel = False
    phb.patch(model)
