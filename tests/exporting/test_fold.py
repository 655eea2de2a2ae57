"""A selection bias folded into the weights of the routers, and what a plain load loses without that."""

import copy
import math

import pytest
import torch
from charging import collect
from checks import assert_same
from peft import LoraConfig, get_peft_model
from references import forward, routers
from steered import with_bias
from steps import build, micro_batches, step_gradient
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


def texts(model, count=4):
    return [tiny_batch(model, 6, 12, seed=seed) for seed in range(count)]


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def naive_shifts(rows, bias, top_k):
    """β of each row of probabilities: the inequality p_e + b_e > τ solved for the logit, in float64 loops."""
    shifts = []
    for row in rows.double().tolist():
        scores = sorted((p + b for p, b in zip(row, bias)), reverse=True)
        tau = (scores[top_k - 1] + scores[top_k]) / 2
        shift = [-math.log(min(max(1 - b / tau, 0.01), 100)) for b in bias]
        shifts.append([value - sum(shift) / len(shift) for value in shift])
    return torch.tensor(shifts, dtype=torch.float64)


def test_one_layer_gets_the_ridge_regression_of_the_shifts():
    """Padding does not count."""
    model, batches = with_bias("mixtral", num_hidden_layers=1), texts(tiny_model("mixtral"))
    plain = tiny_model("mixtral", num_hidden_layers=1)
    (name, router), received = next(iter(routers(plain).items())), []
    handle = router.register_forward_pre_hook(lambda module, args: received.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for batch in batches:
            plain(**batch)
    handle.remove()
    counted = torch.cat([batch["attention_mask"].reshape(-1).bool() for batch in batches])
    assert not counted.all()
    x = torch.cat(received)[counted].double()
    probs, bias = (x @ router.weight.double().T).softmax(-1), phb.get_balancer(model).biases()[name].tolist()
    moment = x.T @ x / len(x)
    ridge = moment + 1e-4 * moment.diagonal().mean() * torch.eye(32)
    expected = torch.linalg.inv(ridge) @ (x.T @ naive_shifts(probs, bias, 2) / len(x))
    before = routers(model)[name].weight.detach().clone()
    report = phb.fold(model, batches)
    torch.testing.assert_close((routers(model)[name].weight - before).double(), expected.T, rtol=1e-3, atol=1e-4)
    mean = x.mean(0)
    assert report.r2[name] == pytest.approx(float(mean @ torch.linalg.inv(ridge) @ mean), rel=1e-4)
    assert report.folded.tokens == int(counted.sum())


def choices_of(model, batches):
    """The choices of each router for the tokens of `batches` that count, as lists."""
    seen = {name: [] for name in routers(model)}
    handles = [
        router.register_forward_hook(lambda module, args, out, name=name: seen[name].append(out[2]))
        for name, router in routers(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    mask = torch.cat([batch["attention_mask"].reshape(-1).bool() for batch in batches])
    return {name: torch.cat(parts)[mask].tolist() for name, parts in seen.items()}


def test_report_measures_what_the_three_models_choose():
    model, batches, held_out = with_bias("mixtral"), texts(tiny_model("mixtral")), texts(tiny_model("mixtral"), 6)[4:]
    dropped, as_trained = phb.unpatch(copy.deepcopy(model)), copy.deepcopy(model)
    report = phb.fold(model, batches, held_out=held_out)
    assert report.held_out
    folded = phb.unpatch(copy.deepcopy(model))
    first = choices_of(as_trained, held_out)
    for variant, subject in (("biased", as_trained), ("dropped", dropped), ("folded", folded)):
        figures = getattr(report, variant)
        for name, rows in choices_of(subject, held_out).items():
            counts = [sum(row.count(expert) for row in rows) for expert in range(8)]
            assert figures.loads[name].tolist() == counts
            assert figures.max_vio[name] == pytest.approx(max(counts) / (sum(counts) / 8) - 1)
            kept = sum(len(set(row) & set(other)) for row, other in zip(rows, first[name]))
            assert figures.changed[name] == pytest.approx(1 - kept / sum(counts), abs=1e-9)
    assert "0.0%" not in str(report).splitlines()[0]


def test_family_with_a_bias_of_its_router_loses_nothing():
    """GPT-OSS ranks logits and its router has a bias, so that bias takes the shift: no choice changes."""
    model = with_bias("gpt_oss", width=0.5, num_hidden_layers=1)
    (name, router) = next(iter(routers(model).items()))
    bias, before = phb.get_balancer(model).biases()[name], router.bias.detach().clone()
    report = phb.fold(model, texts(model))
    torch.testing.assert_close(router.bias - before, bias - bias.mean(), rtol=0, atol=1e-5)
    assert report.folded.changed_share == 0.0 < report.dropped.changed_share
    assert report.r2[name] == 1.0 and report.explained[name] == pytest.approx(1.0)


@pytest.mark.slow
def test_model_goes_on_without_a_bias_and_with_everything_else_as_it_was():
    model = with_bias("mixtral").train()
    balancer, before = phb.get_balancer(model), weights_of(model)
    state, random = balancer.state_dict(), torch.get_rng_state()
    phb.fold(model, iter(texts(model)), rebalance=2)  # an iterator, which is needed for several passes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and not collect(model)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {"model.phi_balance.bias", *(f"{name}.weight" for name in routers(model))}
    after = balancer.state_dict()
    assert all(not after[name].any() for name in after if name.endswith(".bias"))
    others = [{name: part for name, part in duals.items() if not name.endswith(".bias")} for duals in (state, after)]
    assert_same(*others)
    step_gradient(model, micro_batches(model))
    assert any(bias.any() for bias in balancer.biases().values())  # it moves again


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


@pytest.mark.slow
def test_rebalancing_brings_the_loads_nearer_to_those_with_the_bias():
    """A bias that evens out the loads. At random inputs r² is about a half, so folding loses much of it."""
    model = phb.patch(tiny_model("mixtral"), {"bias_coef": 0.003})
    batches = texts(model)
    phb.calibrate(model, batches, bias=True)
    folded, rebalanced = (phb.fold(copy.deepcopy(model), batches, rebalance=passes) for passes in (0, 8))
    assert folded.biased.max_vio_global < 0.1 < folded.dropped.max_vio_global
    assert rebalanced.folded.max_vio_global < 0.6 * folded.folded.max_vio_global


@pytest.mark.slow
def test_rebalancing_leaves_layers_alone_that_are_even_enough():
    folded, rebalanced = with_bias("mixtral"), with_bias("mixtral")
    report = phb.fold(folded, texts(folded))
    assert all(report.folded.max_vio[name] < 1.2 * report.biased.max_vio[name] for name in report.r2)
    phb.fold(rebalanced, texts(folded), rebalance=3)
    assert_same(weights_of(folded), weights_of(rebalanced))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: phb.patch(tiny_model("mixtral"), {"coef": 0.01}), "has no selection bias"),
        (lambda: with_bias("deepseek_v3"), "has a selection bias of its own"),
        (lambda: tiny_model("mixtral"), "is not φ-balanced"),
        (
            lambda: get_peft_model(with_bias("mixtral"), LoraConfig(target_modules=["q_proj"], r=2)),
            r"Merge it first: model = model.merge_and_unload\(\)",
        ),
    ],
    ids=["no bias", "native bias", "not patched", "adapter"],
)
def test_nothing_to_fold_is_said(make, message):
    model = make()
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        phb.fold(model, texts(tiny_model("mixtral")))
    assert_same(weights_of(model), before)


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

    class Once:
        """Batches that end in an error the second time."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 2:
                raise OSError("the disk is gone")
            return (batch for batch in texts(model))

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
    trained = phb.patch(build("mixtral"), {"bias_coef": 0.1})
    step_gradient(trained, micro_batches(trained), close=False)
    with pytest.raises(RuntimeError, match="call this between two steps"):
        phb.fold(trained, texts(trained))


# ---------------------------------------------------------------------- what a plain load loses


def evaluate(model, batches):
    with phb.get_balancer(model).evaluation(), torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
        return phb.get_balancer(model).eval_metrics()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_evaluation_counts_what_a_plain_load_would_choose(model_type):
    """One layer, so that no layer before it chooses otherwise. Padding does not count."""
    model, plain = with_bias(model_type, num_hidden_layers=1), tiny_model(model_type, num_hidden_layers=1)
    batches = texts(model, 3)
    metrics = evaluate(model, batches)
    (name,) = routers(plain)
    with torch.no_grad():
        counts = sum(forward(plain, batch)[1][name].counts for batch in batches)
    assert metrics["plain_max_vio"] == pytest.approx(float(counts.max() / counts.mean()) - 1)
    assert metrics["plain_max_vio"] != pytest.approx(metrics["max_vio"])


@pytest.mark.parametrize("model_type, config", [("deepseek_v3", {"bias_coef": 0.1}), ("mixtral", {"coef": 0.01})])
def test_where_nothing_can_be_lost_nothing_is_said(model_type, config, tmp_path, warned):
    model = phb.patch(tiny_model(model_type), config)
    assert "plain_max_vio" not in evaluate(model, [tiny_batch(model)])
    model.save_pretrained(tmp_path)
    assert not warned.about("plain") and not warned.about("phi_balance.state")


def test_saving_gives_the_figures_and_the_remedy(tmp_path, warned):
    model = with_bias("mixtral")
    model.save_pretrained(tmp_path)
    (line,) = warned.about("loses it and routes some tokens to other experts.")
    assert "phb.fold(model, batches)" in line and "phibalance export" in line
    metrics = evaluate(model, [tiny_batch(model, 6, 12)])
    model.save_pretrained(tmp_path)
    said = f"MaxVio {metrics['plain_max_vio']:.3f} instead of {metrics['max_vio']:.3f} in the last evaluation"
    assert warned.about(said)
    phb.fold(model, [tiny_batch(model, 6, 12)])
    warned.lines.clear()
    model.save_pretrained(tmp_path)
    assert not warned.lines
