"""When an optimizer step ends, which backward adds the price gradient in it, and what is left of one that was given up."""

import gc
import weakref

import pytest
import torch
from charging import COEF, collect, gradients, priced
from checks import assert_same
from steps import added_gradient, assert_gradient, build, difference, micro_batches, step_gradient
from tiny import set_prices, tiny_batch, tiny_model

import hf_phibalance as phb


def sgd(model, lr=0.0):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def unpriced(model, batch):
    """Gradients of the task on the unpatched twin of `priced()`."""
    return gradients(tiny_model(model.config.model_type).train(), batch)


def assert_close(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    "layout", ["two for one model", "one per parameter", "one for two models", "of another model"]
)
def test_optimizers_of_all_kinds(layout):
    """However a model's parameters are shared out, a step is ended once; a stranger's optimizer does not end it."""
    model, other = priced("mixtral", {"bias_coef": 0.1}), priced("mixtral", {"bias_coef": 0.1})
    balancer, parameters = phb.get_balancer(model), list(model.parameters())
    if layout == "one per parameter":  # steps inside the backward
        for parameter in parameters:
            optimizer = torch.optim.SGD([parameter], lr=0.01)
            parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
        optimizers = []
    else:
        groups = {
            "two for one model": [parameters[:4], parameters[4:]],
            "one for two models": [[*parameters, *other.parameters()]],
            "of another model": [list(other.parameters())],
        }
        optimizers = [torch.optim.SGD(group, lr=0.01) for group in groups[layout]]
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert balancer.steps == (layout != "of another model") and phb.get_balancer(other).steps == 0
    balancer.step()
    assert balancer.steps == 1 and balancer.metrics()["tokens"] == batch["attention_mask"].sum()
    assert all(load.sum() == 2 * batch["attention_mask"].sum() for load in balancer.loads().values())


def test_a_model_whose_routers_get_no_backward_says_so(warned):
    model = priced()
    model.requires_grad_(False).lm_head.requires_grad_(True)
    optimizer = sgd(model)
    for _ in range(20):
        model(**tiny_batch(model)).loss.backward()
        optimizer.step()
    (line,) = warned.about("no gradient came back through its routers")
    assert "frozen" in line and phb.get_balancer(model).steps == 0


# ---------------------------------------------------------------------- its backwards


def test_several_forwards_with_one_backward_need_no_announcement():
    batches = micro_batches(build("mixtral"))
    announced = added_gradient(build("mixtral"), {"coef": COEF}, batches, set_prices)
    model = build("mixtral")
    plain = step_gradient(model, batches)
    set_prices(phb.patch(model, {"coef": COEF}))
    model.zero_grad()
    (sum(model(**batch).loss for batch in batches) / len(batches)).backward()
    assert_gradient(difference(collect(model), plain), announced)


@pytest.mark.parametrize("price_from", ["previous", "global"])
def test_a_second_backward_that_was_not_announced_is_refused(price_from):
    model = priced("mixtral", {"price_from": price_from})
    model(**tiny_batch(model)).loss.backward()
    loss = model(**tiny_batch(model, seed=1)).loss
    with pytest.raises(RuntimeError, match=r"backward number 2 .* had? ?.*begin_step\(batches\).*discard_step"):
        loss.backward()


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
    assert_close(difference(collect(model), before), unpriced(model, batches[2]))
    balancer.step()
    assert balancer.metrics()["tokens"] == sum(batch["attention_mask"].sum() for batch in batches)
    assert balancer.steps == 1


def test_a_wrong_number_of_announced_micro_batches_is_said(warned):
    model = priced()
    phb.get_balancer(model).begin_step(4)
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    assert "0.25 of the coefficient" in warned.about("announced micro-batches")[0]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_a_backward_that_is_repeated_adds_the_price_gradient_once(model_type):
    model = priced(model_type)
    batch = tiny_batch(model)
    task, charged = unpriced(model, batch), gradients(model, batch)
    phb.get_balancer(model).discard_step()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(collect(model), {name: charged[name] + task[name] for name in charged})
    phb.get_balancer(model).step()
    assert phb.get_balancer(model).metrics()["tokens"] == batch["attention_mask"].sum()


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_a_backward_with_create_graph_is_the_tasks_own(model_type, warned):
    """It adds nothing and counts; a first-order backward that follows, as of a penalty on gradients, adds the price's."""
    model, plain = priced(model_type), tiny_model(model_type).train()
    for one in (model, plain):
        one.set_attn_implementation("eager")  # whose backward has a derivative
    batch = tiny_batch(model)
    gate = next(name for name, p in model.named_parameters() if "gate.weight" in name)
    task = gradients(plain, batch)

    loss = model(**batch).loss
    found = torch.autograd.grad(loss, model.get_parameter(gate), create_graph=True)[0]
    torch.testing.assert_close(found, task[gate], rtol=1e-4, atol=1e-6)
    phb.get_balancer(model).step()
    assert phb.get_balancer(model).steps == 1 and len(warned.about("create_graph=True alone")) == 1
    assert phb.get_balancer(model).metrics()["tokens"] == batch["attention_mask"].sum()

    set_prices(model)
    added = difference(gradients(model, batch), task)
    phb.get_balancer(model).discard_step()
    with_penalty = []
    for one in (model, plain):
        one.zero_grad()
        loss = one(**batch).loss
        (slope,) = torch.autograd.grad(loss, one.get_parameter(gate), create_graph=True)
        (loss + slope.square().sum()).backward()
        with_penalty.append(collect(one))
    assert_gradient(difference(*with_penalty), added)


# ---------------------------------------------------------------------- gradient scalers


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_moves_nothing(fused):
    """The scale of the loss is found; the step that the scaler skips is forgotten, and the next one needs no call."""
    model, plain = priced("mixtral", {"bias_coef": 0.1}), priced("mixtral", {"bias_coef": 0.1})
    balancer, optimizer = phb.get_balancer(model), torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
    scaler, parameter = torch.amp.GradScaler("cpu", init_scale=1024.0), next(model.parameters())
    for turn, seed in enumerate((0, 1, 2)):
        before, batch = balancer.state_dict(), tiny_batch(model, seed=seed)
        model.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        if turn == 1:
            parameter.grad[0, 0] = torch.inf
        else:
            scaled = {name: grad / scaler.get_scale() for name, grad in collect(model).items()}
            assert_close(scaled, gradients(plain, batch))
            phb.get_balancer(plain).step()
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(balancer.state_dict()[name], before[name]) for name in before) is (turn != 1)
        for name, tensor in phb.get_balancer(plain).state_dict().items():
            if name != "steps":
                torch.testing.assert_close(balancer.state_dict()[name], tensor, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- steps that are given up, and models


def test_a_step_that_is_given_up_is_forgotten():
    """By `zero_grad()`, which takes its gradients, or by a forward whose loss is dropped."""
    model, reference = priced(), priced()
    for one in (model, reference):
        one.zero_grad()
        if one is model:
            one(**tiny_batch(one, seed=1)).loss.backward()
            one.zero_grad(set_to_none=True)
            one(**tiny_batch(one, seed=2))
        one(**tiny_batch(one)).loss.backward()
        phb.get_balancer(one).step()
    assert_same(collect(model), collect(reference))
    assert_same(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


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


@pytest.mark.parametrize(
    ("wrong", "remedy"), [({"input_ids": torch.zeros(1, 2)}, r"\[batch\]"), ((batch for batch in ()), "list")]
)
def test_micro_batches_that_are_no_list_are_refused(wrong, remedy):
    model = phb.patch(tiny_model("mixtral"))
    with pytest.raises(ValueError, match=remedy):
        phb.get_balancer(model).begin_step(wrong)


def test_what_is_no_model_and_no_trainer_is_refused():
    with pytest.raises(TypeError, match="from_pretrained"):
        phb.patch("mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(TypeError, match="Trainer"):
        phb.attach(phb.patch(tiny_model("mixtral")))
