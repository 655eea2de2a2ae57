"""When an optimizer step ends, what announcements of it mean, and what begins anew. Loops as people write them: `ordinary/`."""

import gc
import weakref

import pytest
import torch
from charging import COEF, collect, gradients, priced
from checks import assert_same
from steps import difference, micro_batches
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


def sgd(model, lr=0.0):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


# ---------------------------------------------------------------------- its end


def test_the_optimizer_ends_the_step_and_a_call_changes_nothing():
    model, by_hand = priced("mixtral", {"bias_coef": 0.1}), priced("mixtral", {"bias_coef": 0.1})
    balancer, optimizer = phb.get_balancer(model), sgd(model)
    balancer.step()  # nothing to end
    assert balancer.steps == 0
    for seed in range(2):
        batch = tiny_batch(model, seed=seed)
        assert_same(gradients(model, batch), gradients(by_hand, batch))
        optimizer.step()
        ended = balancer.state_dict()
        for _ in range(3):
            balancer.step()
            optimizer.step()
        assert_same(balancer.state_dict(), ended)
        phb.get_balancer(by_hand).step()
    assert balancer.steps == 2
    assert_same(ended, phb.get_balancer(by_hand).state_dict())
    assert_same(balancer.loads(), phb.get_balancer(by_hand).loads())


def test_one_optimizer_for_two_models_ends_the_step_of_each_that_trained():
    model, other = priced("mixtral", {"bias_coef": 0.1}), priced("mixtral", {"bias_coef": 0.1})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)
    model(**batch).loss.backward()
    optimizer.step()
    assert balancer.steps == 1 and phb.get_balancer(other).steps == 0
    assert balancer.metrics()["tokens"] == batch["attention_mask"].sum()


# ---------------------------------------------------------------------- its backwards


def test_an_announcement_in_the_middle_of_a_step_shares_its_coefficient(warned):
    """Each announced once only: the price gradient of the step is no more than the configured one, and all tokens count."""
    model = priced()
    balancer, batches = phb.get_balancer(model), micro_batches(model)
    model.zero_grad()
    balancer.begin_step(batches[:2])
    balancer.begin_step(batches[:2])  # nothing has come yet: the same again
    assert not warned.about("begin_step() came again")
    for batch in batches[:2]:
        model(**batch).loss.backward()
    before = collect(model)
    balancer.begin_step(batches[2:])
    assert len(warned.about("begin_step() came again")) == 1
    model(**batches[2]).loss.backward()
    task = gradients(tiny_model("mixtral").train(), batches[2])
    for name, gradient in difference(collect(model), before).items():
        torch.testing.assert_close(gradient, task[name], rtol=1e-4, atol=1e-5)
    balancer.step()
    assert balancer.metrics()["tokens"] == sum(batch["attention_mask"].sum() for batch in batches)
    assert balancer.steps == 1


def test_a_wrong_number_of_announced_micro_batches_is_said(warned):
    model = priced()
    phb.get_balancer(model).begin_step(4)
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    assert "0.25 of the coefficient" in warned.about("announced micro-batches")[0]


# ---------------------------------------------------------------------- anew, and gone


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_reset_begins_anew(model_type):
    """A family's own bias stays as it is, since it belongs to the weights."""
    model, fresh = (phb.patch(tiny_model(model_type).train(), {"coef": COEF, "bias_coef": 0.1}) for _ in range(2))
    balancer = phb.get_balancer(model)
    for seed in range(2):
        gradients(model, tiny_batch(model, seed=seed))
        balancer.step()
    trained = balancer.biases()
    model(**tiny_batch(model)).loss.backward()  # of a step that is given up as well
    balancer.reset()
    state = phb.get_balancer(fresh).state_dict()
    if model_type == "deepseek_v3":
        state |= {f"{name.removeprefix('model.')}.bias": bias for name, bias in trained.items()}
    assert_same(balancer.state_dict(), state)
    assert balancer.steps == 0 and not any(load.any() for load in balancer.loads().values())
    assert not any(price.abs().max() > 1e-6 for price in balancer.prices().values())
    balancer.step()
    assert balancer.steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_is_freed_with_its_last_reference(trained):
    """Nothing of ours keeps it alive, and no circle that only a garbage collection would find (but for its few duals)."""
    model = priced("mixtral", {"bias_coef": 0.1})
    optimizer = sgd(model)
    if trained:
        model(**tiny_batch(model)).loss.backward()
        optimizer.step()
        with torch.no_grad(), phb.get_balancer(model).evaluation():
            model.eval()(**tiny_batch(model))
    del optimizer
    gc.collect()
    gc.disable()
    try:
        references = [weakref.ref(x) for x in (model, model.model, model.lm_head.weight)]
        del model
        assert not any(reference() for reference in references)
    finally:
        gc.enable()
