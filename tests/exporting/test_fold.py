"""A selection bias folded into the routers' weights: against naive regressions, the biased model, and plain loads."""

import copy
import math

import pytest
import torch
from charging import collect
from checks import assert_same
from peft import LoraConfig, get_peft_model
from references import routers
from steered import with_bias
from steps import build, micro_batches, step_gradient
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


def texts(model, count=4):
    return [tiny_batch(model, 6, 12, seed=seed) for seed in range(count)]


def naive_shifts(rows, bias, top_k):
    """β of each row of probabilities, by the inequality p_e + b_e > τ solved for the logit, in float64 loops."""
    shifts = []
    for row in rows.double().tolist():
        scores = sorted((p + b for p, b in zip(row, bias)), reverse=True)
        tau = (scores[top_k - 1] + scores[top_k]) / 2
        shift = [-math.log(min(max(1 - b / tau, 0.01), 100)) for b in bias]
        shifts.append([value - sum(shift) / len(shift) for value in shift])
    return torch.tensor(shifts, dtype=torch.float64)


def test_one_layer_gets_the_ridge_regression_of_the_shifts():
    model, batches = with_bias("mixtral", num_hidden_layers=1), texts(tiny_model("mixtral"))
    plain = tiny_model("mixtral", num_hidden_layers=1)
    (name, router), received = next(iter(routers(plain).items())), []
    handle = router.register_forward_pre_hook(lambda module, args: received.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for batch in batches:
            plain(**batch)
    handle.remove()
    counted = torch.cat([batch["attention_mask"].reshape(-1).bool() for batch in batches])
    x = torch.cat(received)[counted].double()
    shifts = naive_shifts(
        (x @ router.weight.double().T).softmax(-1), phb.get_balancer(model).biases()[name].tolist(), 2
    )
    moment = x.T @ x / len(x)
    ridge = moment + 1e-4 * moment.diagonal().mean() * torch.eye(32)
    expected = torch.linalg.inv(ridge) @ (x.T @ shifts / len(x))
    before = routers(model)[name].weight.detach().clone()
    report = phb.fold(model, batches)
    torch.testing.assert_close((routers(model)[name].weight - before).double(), expected.T, rtol=1e-3, atol=1e-4)
    mean = x.mean(0)
    assert report.r2[name] == pytest.approx(float(mean @ torch.linalg.inv(ridge) @ mean), rel=1e-4)
    assert report.folded.tokens == int(counted.sum())


def test_report_measures_what_the_three_models_choose():
    """Loads and changed choices are counted anew, on three models of their own."""
    model, batches, held_out = with_bias("mixtral"), texts(tiny_model("mixtral")), texts(tiny_model("mixtral"), 6)[4:]
    dropped = phb.unpatch(copy.deepcopy(model))
    as_trained = copy.deepcopy(model)
    report = phb.fold(model, batches, held_out=held_out)
    assert report.held_out
    chosen = {}
    for variant, subject in (
        ("biased", as_trained),
        ("dropped", dropped),
        ("folded", phb.unpatch(copy.deepcopy(model))),
    ):
        seen = {name: [] for name in routers(subject)}
        handles = [
            router.register_forward_hook(lambda module, args, out, name=name, seen=seen: seen[name].append(out[2]))
            for name, router in routers(subject).items()
        ]
        with torch.no_grad():
            for batch in held_out:
                subject.eval()(**batch)
        for handle in handles:
            handle.remove()
        mask = torch.cat([batch["attention_mask"].reshape(-1).bool() for batch in held_out])
        chosen[variant] = {name: torch.cat(parts)[mask].tolist() for name, parts in seen.items()}
    for variant, choices in chosen.items():
        figures = getattr(report, variant)
        for name, rows in choices.items():
            counts = [sum(row.count(expert) for row in rows) for expert in range(8)]
            assert figures.loads[name].tolist() == counts
            assert figures.max_vio[name] == pytest.approx(max(counts) / (sum(counts) / 8) - 1)
            kept = sum(len(set(row) & set(first)) for row, first in zip(rows, chosen["biased"][name]))
            assert figures.changed[name] == pytest.approx(1 - kept / sum(counts), abs=1e-9)
    assert "0.0%" not in str(report).splitlines()[0]
    assert set(report.to_dict()["layers"]) == set(report.r2)


def test_family_with_a_bias_of_its_router_loses_nothing():
    """GPT-OSS ranks logits, so the shift is the bias itself, and its router has a place for it: not one choice changes."""
    model = with_bias("gpt_oss", width=0.5, num_hidden_layers=1)
    (name, router) = next(iter(routers(model).items()))
    bias, before = phb.get_balancer(model).biases()[name], router.bias.detach().clone()
    report = phb.fold(model, texts(model))
    torch.testing.assert_close(router.bias - before, bias - bias.mean(), rtol=0, atol=1e-5)
    assert report.folded.changed_share == 0.0 < report.dropped.changed_share
    assert report.r2[name] == 1.0 and report.explained[name] == pytest.approx(1.0)


def test_model_goes_on_without_a_bias_and_with_everything_else_as_it_was():
    model = with_bias("mixtral").train()
    balancer, before = phb.get_balancer(model), {name: p.detach().clone() for name, p in model.state_dict().items()}
    state, random = balancer.state_dict(), torch.get_rng_state()
    phb.fold(model, iter(texts(model)), rebalance=2)  # an iterator, of which it needs several passes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and not collect(model)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {"model.phi_balance.bias", *(f"{name}.weight" for name in routers(model))}
    after = balancer.state_dict()
    assert all(not after[name].any() for name in after if name.endswith(".bias"))
    assert_same(
        *({name: part for name, part in duals.items() if not name.endswith(".bias")} for duals in (state, after))
    )
    step_gradient(model, micro_batches(model))
    assert any(bias.any() for bias in balancer.biases().values())  # which goes on to move


def test_training_goes_on_with_the_same_optimizer():
    model = with_bias("mixtral").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    batch = tiny_batch(model, 6, 12)
    for step in range(12):
        if step == 6:
            kept = copy.deepcopy(optimizer.state_dict())
            phb.fold(model, texts(model))
            for index, state in optimizer.state_dict()["state"].items():
                assert_same(state, kept["state"][index])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        phb.get_balancer(model).step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[6] < losses[0]


def test_rebalancing_brings_the_loads_nearer_to_those_with_the_bias():
    """A bias that evens out the loads; the routers' inputs at random have r² of a half, so folding loses much of it."""
    model = phb.patch(tiny_model("mixtral"), {"bias_coef": 0.003})
    batches = texts(model)
    phb.calibrate(model, batches, bias=True)
    folded, rebalanced = (phb.fold(copy.deepcopy(model), batches, rebalance=passes) for passes in (0, 8))
    assert folded.biased.max_vio_global < 0.1 < folded.dropped.max_vio_global
    assert rebalanced.folded.max_vio_global < 0.6 * folded.folded.max_vio_global


def test_rebalancing_leaves_layers_alone_that_are_even_enough():
    """Folding makes these loads more even than the bias did, which nobody has asked to undo."""
    folded, rebalanced = with_bias("mixtral"), with_bias("mixtral")
    report = phb.fold(folded, texts(folded))
    assert all(report.folded.max_vio[name] < 1.2 * report.biased.max_vio[name] for name in report.r2)
    phb.fold(rebalanced, texts(folded), rebalance=3)
    assert_same(weights_of(folded), weights_of(rebalanced))


def test_padding_does_not_count():
    whole, padded = with_bias("mixtral"), with_bias("mixtral")
    batch = tiny_batch(whole, 4, 12, padded=False)
    wider = {
        name: torch.cat([part, torch.full((4, 5), fill)], 1)
        for (name, part), fill in zip(batch.items(), (0, 0, -100), strict=True)
    }
    phb.fold(whole, [batch])
    phb.fold(padded, [wider])
    for name, router in routers(whole).items():
        torch.testing.assert_close(routers(padded)[name].weight, router.weight, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- what is refused


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: phb.patch(tiny_model("mixtral"), {"coef": 0.01}), "has no selection bias"),
        (lambda: with_bias("deepseek_v3"), "has a selection bias of its own"),
        (lambda: tiny_model("mixtral"), "is not φ-balanced"),
    ],
    ids=["no bias", "native bias", "not patched"],
)
def test_nothing_to_fold_is_said(make, message):
    model = make()
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        phb.fold(model, texts(model))
    assert_same(weights_of(model), before)


def test_adapters_are_to_be_merged_first():
    model = with_bias("mixtral")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"Merge it first: model = model.merge_and_unload\(\)"):
        phb.fold(adapted, texts(model))
    merged = adapted.merge_and_unload()
    assert phb.fold(merged, texts(merged)).folded.tokens


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_routers_are_refused(dtype):
    model = with_bias("mixtral")
    router = next(iter(routers(model).values()))
    router.weight = torch.nn.Parameter(router.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised, or sharded.*Load the model whole and without quantisation"):
        phb.fold(model, texts(model))


def test_router_that_is_not_linear_is_refused_and_the_model_left_alone(monkeypatch):
    model = with_bias("mixtral")
    before = weights_of(model)
    router_class = type(next(iter(routers(model).values())))
    original = router_class.forward
    monkeypatch.setattr(router_class, "forward", lambda self, hidden: original(self, hidden.tanh() + hidden.flip(-1)))
    with pytest.raises(ValueError, match="ranks neither the logits of its matrix nor their softmax or sigmoid"):
        phb.fold(model, texts(model))
    assert_same(weights_of(model), before)


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = with_bias("mixtral")
    before, bias = weights_of(model), phb.get_balancer(model).biases()

    def batches():
        yield from texts(model)

    class Once:
        """Batches that end in an error the second time."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 2:
                raise OSError("the disk is gone")
            return batches()

    with pytest.raises(OSError, match="the disk is gone"):
        phb.fold(model, Once())
    assert_same(weights_of(model), before)
    assert_same(phb.get_balancer(model).biases(), bias)


def test_no_token_and_half_a_step_are_refused():
    model = with_bias("mixtral")
    empty = {name: torch.zeros_like(part) for name, part in tiny_batch(model).items()}
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="hold no token that counts"):
            phb.fold(model, batches)
    with pytest.raises(ValueError, match="which does not tell the tokens that count"):
        phb.fold(model, [{"pixel_values": torch.zeros(1)}])
    trained = build("mixtral")
    phb.patch(trained, {"bias_coef": 0.1})
    step_gradient(trained, micro_batches(trained), close=False)
    with pytest.raises(RuntimeError, match="call this between two steps"):
        phb.fold(trained, texts(trained))
