"""The price gradient of φ for each potential and statistic, and for each time at which its price is taken."""

import pytest
import torch
from charging import COEF
from references import forward, phi_loss, share
from steps import added_gradient, assert_gradient, build, difference, loss_gradient, micro_batches, step_gradient
from tiny import set_prices

import hf_phibalance as phb


pytestmark = pytest.mark.slow


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
    assert min((mean - 1 / len(mean)).abs().max() for mean in means.values()) > 0.05
    loss = phi_loss(means, price_from, potential, 0.4, track)
    assert_gradient(added, loss_gradient(build(model_type), batches, [(COEF, loss)]))


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.5, 0, 0]), ("cosine", [1, 0.5, 0, 0]), ("off", [1, 1, 0, 0])],
)
def test_gradient_of_a_step_follows_the_schedule(schedule, shares):
    """The same step again and again, with the same prices, as if it were the first, the second, ..."""
    model, batches = build("mixtral"), micro_batches(build("mixtral"))
    plain = step_gradient(model, batches)
    config = {"coef": COEF, "schedule": schedule, "schedule_steps": 0 if schedule == "constant" else 2}
    phb.patch(model, config)
    balancer = phb.get_balancer(model)
    declared = None
    for step, part in enumerate(shares):
        assert balancer.steps == step and balancer.coef == pytest.approx(COEF * part)
        set_prices(model)
        added = difference(step_gradient(model, batches), plain)
        declared = added if declared is None else declared
        assert balancer.metrics().get("coef") == (None if schedule == "constant" else balancer.coef)
        for name, gradient in added.items():
            torch.testing.assert_close(gradient, part * declared[name], rtol=1e-3, atol=1e-5)
    assert_gradient(declared, added_gradient(build("mixtral"), {"coef": COEF}, batches, set_prices))


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
