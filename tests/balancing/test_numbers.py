"""Numbers at the edges: routers that collapse, experts that nobody sees, extreme shapes, half precision, bias wind-up."""

import math

import pytest
import torch
import torch.nn.functional as F
from charging import COEF, assert_charged_as_defined, by_definition, collect, priced
from driven import counts_of, make_duals
from references import routers
from shifted import shifted
from steps import UNGROUPED
from tiny import set_prices, tiny_batch, tiny_model

import hf_phibalance as phb


pytestmark = pytest.mark.slow


def naive_prices(mean):
    """log of the relative load, at least that of a millionth, centred (float64)."""
    price = [math.log(max(len(mean) * m, 1e-6)) for m in mean]
    return torch.tensor([q - sum(price) / len(price) for q in price], dtype=torch.float64)


def count(model, batch):
    """A step in which nothing learns."""
    model(**batch).logits.sum().backward()
    phb.get_balancer(model).step()
    model.zero_grad()


def own_loss(model, batch):
    """Gradients of a loss that needs no labels."""
    model.zero_grad()
    model(**batch).logits.square().mean().backward()
    return collect(model)


# ---------------------------------------------------------------------- who is chosen


def test_all_tokens_to_one_expert():
    """Sixty steps; the price ends at log E against the floor, gradients and weights stay finite."""
    model = priced("mixtral", {"bias_coef": 0.01})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    expected = {name: mean.double() for name, mean in balancer.means().items()}
    with shifted(model, 3, by=200.0):
        for _ in range(60):
            model.zero_grad()
            model(**batch).loss.backward()
            balancer.step()
            expected = {n: 0.7 * m + 0.3 * torch.eye(8, dtype=torch.float64)[3] for n, m in expected.items()}
            assert all(torch.isfinite(gradient).all() for gradient in collect(model).values())
    for name, price in balancer.prices().items():
        assert balancer.loads()[name][3] == batch["attention_mask"].sum()
        torch.testing.assert_close(price.double(), naive_prices(expected[name].tolist()), rtol=1e-4, atol=1e-4)
        assert 1.0 < price.max() - price.min() < math.log(8) - math.log(1e-6) + 1e-3
    count(model, batch)  # and out of it again
    assert all(torch.isfinite(price).all() for price in balancer.prices().values())


def test_an_expert_unseen_for_ten_thousand_steps():
    """Its mean is 0, its price the floor's, its bias at its reach; seen again, the mean and price follow at once."""
    duals = make_duals({"coef": 0.01, "bias_coef": 0.003}, [8])
    without = torch.tensor([0.0] + [1 / 7] * 7)
    counts = counts_of(duals, [100 * without], [200 * without])
    for _ in range(10_000):
        duals.update(counts)
    torch.testing.assert_close(duals.price[0].double(), naive_prices(without.tolist()), rtol=1e-5, atol=1e-5)
    bias = duals.biases[0] - duals.biases[0].mean()
    torch.testing.assert_close(bias, torch.tensor([1.0] + [-1 / 7] * 7), rtol=0, atol=1e-5)
    for step in range(1, 31):
        duals.update(counts_of(duals, [torch.full((8,), 12.5)], [torch.full((8,), 25.0)]))
        mean = [(1 - 0.7**step) / 8] + [(1 - (1 - 0.7**step) / 8) / 7] * 7
        torch.testing.assert_close(duals.mean("load")[0], torch.tensor(mean), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(duals.price[0].double(), naive_prices(mean), rtol=1e-4, atol=1e-5)
    assert duals.price.abs().max() < 1e-4


@pytest.mark.parametrize(("experts", "top_k"), [(512, 8), (8, 8), (8, 1)], ids=["512_experts", "k_is_E", "k_is_1"])
def test_extreme_shapes(experts, top_k):
    shape = {"num_local_experts": experts, "num_experts_per_tok": top_k, "num_hidden_layers": 1}
    model = priced("mixtral", {"bias_coef": 0.01}, **shape)
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    assert_charged_as_defined(model, batch)
    (name,) = balancer.layer_names
    before = balancer.biases()[name]
    with torch.no_grad():
        (router,) = routers(model).values()
        chosen = []
        handle = router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    phb.patch(model, {"coef": COEF, "bias_coef": 0.01, "ema_rate": 1.0})
    balancer = phb.get_balancer(model)
    count(model, batch)
    handle.remove()
    counted = chosen[0][batch["attention_mask"].flatten().bool()].flatten()
    load = torch.bincount(counted, minlength=experts)
    assert torch.equal(balancer.loads()[name], load.float())
    expected = before.double() - 0.01 * naive_prices((load / load.sum()).tolist())
    torch.testing.assert_close(balancer.biases()[name].double(), expected, rtol=0, atol=1e-5)
    assert bool(balancer.biases()[name].any()) == (top_k < experts)  # with k = E there is nothing to choose


def test_one_token_a_batch():
    batch = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
    model = priced("mixtral")
    charged = own_loss(model, batch)
    phb.patch(model, {"coef": 0.0})  # keeps the prices
    task, expected = own_loss(model, batch), by_definition(model, batch)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    """Duals in fp32, close to those of fp32 weights; the charge is the definition's up to the rounding of the weights."""
    model = phb.patch(tiny_model("mixtral", dtype=dtype).train(), {"coef": COEF, "bias_coef": 0.01})
    full = phb.patch(tiny_model("mixtral").train(), {"coef": COEF, "bias_coef": 0.01})
    batch = tiny_batch(model)
    for one in (model, full):
        count(one, batch)
    for kind in ("probs", "load"):
        for name, mean in phb.get_balancer(model).means(kind).items():
            assert mean.dtype == torch.float32 and abs(float(mean.sum()) - 1) < 1e-6
            assert (mean - phb.get_balancer(full).means(kind)[name]).abs().max() < 0.05
    set_prices(model)
    charged = own_loss(model, batch)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.01})
    task, expected = own_loss(model, batch), by_definition(model, batch)
    names = [name for name in expected if name.endswith("gate.weight")]
    added, defined = (
        torch.cat([grads[name].float().flatten() for name in names])
        for grads in ({name: charged[name].float() - task[name].float() for name in names}, expected)
    )
    assert (added - defined).norm() < 0.03 * defined.norm()


# ---------------------------------------------------------------------- bias wind-up

RATE = 0.02
# Steps that an expert may take back once its mask is lifted, however long it was there. From twice its reach above the mean of the
# others down to where it belongs, at the speed log(E/k) · RATE of an expert that takes all tokens, and what the EMA remembers;
# by as much a step as it went up; and at once, since its scores of 0 leave a quantile of their own.
BACK = {
    "phi": ({"coef": 0.0, "bias_coef": RATE}, 0.99, 3 / (RATE * math.log(4)) + 10),
    "loss_free": ({"method": "loss_free", "bias_coef": RATE}, 0.99, 3 / RATE),
    "quantile": ({"method": "quantile"}, 0.05, 1),
}


@pytest.mark.parametrize("method", BACK)
def test_a_bias_comes_back_after_its_expert_was_masked(method):
    config, wound_up, allowed = BACK[method]
    model = phb.patch(tiny_model("mixtral", num_hidden_layers=1).train(), config)
    balancer, batch = phb.get_balancer(model), tiny_batch(model, 8, 32)
    (name,) = balancer.layer_names
    tokens = int(batch["attention_mask"].sum())
    model.requires_grad_(False).model.norm.requires_grad_(True)
    with shifted(model, 2, by=-torch.inf):
        for _ in range(150):
            count(model, batch)
            bias = balancer.biases()[name]
            assert torch.isfinite(bias).all() and (bias - bias.mean()).abs().max() <= 2
    assert balancer.loads()[name][2] == 0
    assert bias.argmax() == 2 and bias[2] - bias.mean() > wound_up
    steps = 0
    while steps == 0 or balancer.loads()[name][2] > 0.5 * tokens:  # twice its fair share
        count(model, batch)
        assert steps > 0 or wound_up < 0.5 or balancer.loads()[name][2] == tokens  # the bias outweighs every score
        steps += 1
    assert steps <= allowed


@pytest.mark.parametrize("config", [{"coef": 0.0, "bias_coef": RATE}, BACK["loss_free"][0]], ids=["phi", "loss_free"])
def test_a_masked_expert_is_never_chosen_by_a_family_that_adds_the_bias_itself(config, monkeypatch):
    """DeepSeek-V3 adds it to a score of 0 as well: the bias keeps its place among the others, and does not wander off with them."""
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse"]}
    model = phb.patch(tiny_model("deepseek_v3", **UNGROUPED, **sizes).train(), config)
    balancer, batch = phb.get_balancer(model), tiny_batch(model, 8, 32)
    ((name, router),) = routers(model).items()
    model.requires_grad_(False).model.norm.requires_grad_(True)
    for _ in range(5):
        count(model, batch)
    before = balancer.biases()[name]
    linear, others = F.linear, [e for e in range(8) if e != 2]

    def masked(hidden, weight, *args):
        logits = linear(hidden, weight, *args)
        return logits.index_fill(-1, torch.tensor(2), -torch.inf) if torch.equal(weight, router.weight) else logits

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", masked)
        spread = []
        for _ in range(100):
            count(model, batch)
            load = balancer.loads()[name]
            assert load[2] == 0
            spread.append(load[others].max() - load[others].min())
    bias = balancer.biases()[name]
    assert bias[2] == before[2] == router.e_score_correction_bias[2]
    torch.testing.assert_close(bias[others].mean(), before[others].mean(), rtol=0, atol=1e-4)
    assert max(spread[-10:]) < max(spread[:10])  # the others go on being balanced
    count(model, batch)
    assert balancer.loads()[name][2] > 0
