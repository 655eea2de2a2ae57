"""Biases on the selection: by the sign of the counts, beside a Switch price, and what holds for all of them."""

import pytest
import torch
from charging import COEF
from checks import assert_same
from references import LOSSES, forward, loss_free_step, routers, select_with, start_with
from steps import assert_gradient, build, dealt, difference, loss_gradient, many_tokens, micro_batches, step_gradient
from tiny import tiny_batch

import hf_phibalance as phb


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", ["switch", "global_batch"])
def test_the_bias_beside_a_switch_price_follows_the_excess_load(method, model_type):
    """b <- b - bias_coef (E f - 1), f of the whole step, while the gradient stays that of the loss."""
    model = build(model_type)
    phb.patch(model, {"method": method, "coef": COEF, "bias_coef": 0.03})
    balancer = phb.get_balancer(model)
    biases = {name: bias.double() for name, bias in balancer.biases().items()}
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


@pytest.mark.slow
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
