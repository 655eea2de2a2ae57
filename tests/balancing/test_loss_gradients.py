"""The losses of Switch, pooled and global-batch balancing: what a patch adds to the task gradient is theirs by formula."""

import pytest
import torch
from charging import COEF, collect
from checks import assert_same
from references import LOSSES, forward, pooled_loss, sequence_loss, z_loss
from steps import (
    CHECKPOINTING,
    FAMILIES,
    added_gradient,
    assert_gradient,
    build,
    difference,
    loss_gradient,
    micro_batches,
    step_gradient,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import hf_phibalance as phb


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", LOSSES)
def test_gradient_of_a_loss(method, model_type):
    batches = micro_batches(build(model_type))
    added = added_gradient(build(model_type), {"method": method, "coef": COEF}, batches)
    assert_gradient(added, loss_gradient(build(model_type), batches, [(COEF, LOSSES[method])]))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("method", LOSSES)
def test_gradient_of_a_loss_under_checkpointing(method, checkpointing):
    batches = micro_batches(build("qwen3_moe"))
    added = added_gradient(build("qwen3_moe", checkpointing), {"method": method, "coef": COEF}, batches)
    assert_gradient(added, loss_gradient(build("qwen3_moe"), batches, [(COEF, LOSSES[method])]))


def test_the_losses_differ():
    """Guards the tests above: on these micro-batches no reference stands for another."""
    model = build("mixtral")
    batches = micro_batches(model)
    gradients = [loss_gradient(model, batches, [(COEF, loss)]) for loss in LOSSES.values()]
    for i, left in enumerate(gradients):
        for right in gradients[:i]:
            with pytest.raises(AssertionError):
                assert_gradient(left, right, tolerance=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", LOSSES)
def test_losses_over_the_labelled_tokens(method):
    model = build("mixtral")
    batches = micro_batches(model)
    for batch in batches:
        batch["labels"][:, :3] = -100
    added = added_gradient(model, {"method": method, "coef": COEF, "token_mask": "labels"}, batches)
    reference = [(COEF, LOSSES[method])]
    assert_gradient(added, loss_gradient(build("mixtral"), batches, reference, token_mask="labels"))


@pytest.mark.slow
@pytest.mark.parametrize("method", LOSSES)
def test_losses_where_only_the_number_of_micro_batches_is_known(method):
    """Then each micro-batch has the same share of the step."""
    model = build("mixtral")
    batches = micro_batches(model)
    added = added_gradient(model, {"method": method, "coef": COEF}, batches, announce=len(batches))
    shares = [1 / len(batches)] * len(batches)
    assert_gradient(added, loss_gradient(build("mixtral"), batches, [(COEF, LOSSES[method])], shares))


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_pooled_is_the_loss_of_transformers(model_type):
    model = build(model_type)
    (batch,) = micro_batches(model, [(3, 9)])
    assert 0 < batch["attention_mask"].sum() < batch["attention_mask"].numel()

    def published(so_far):
        logits = tuple(r.logits for r in so_far[-1].values())
        return load_balancing_loss_func(logits, model.config.num_local_experts, 2, batch["attention_mask"])

    expected = loss_gradient(model, [batch], [(COEF, published)])
    assert_gradient(added_gradient(model, {"method": "pooled", "coef": COEF}, [batch]), expected)


def test_the_built_in_loss_does_not_come_on_top():
    model = build("mixtral", router_aux_loss_coef=1.0, output_router_logits=True)
    (batch,) = micro_batches(model, [(3, 9)])
    plain = step_gradient(build("mixtral"), [batch])
    phb.patch(model, {"method": "pooled", "coef": COEF})
    added = difference(step_gradient(model, [batch]), plain)
    assert_gradient(added, loss_gradient(build("mixtral"), [batch], [(COEF, pooled_loss)]))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", LOSSES)
def test_the_logged_loss_is_the_value_of_the_formula(method, checkpointing):
    """Less its value at balance, which charges nothing."""
    model = build("mixtral", checkpointing)
    batches = micro_batches(model)
    phb.patch(model, {"method": method, "coef": COEF})
    step_gradient(model, batches)
    with torch.no_grad():
        routed = [forward(build("mixtral"), batch)[1] for batch in batches]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    values = [float(LOSSES[method](routed[: j + 1])) for j in range(len(batches))]
    at_balance = 2 if method == "pooled" else len(routed[0])
    expected = COEF * (sum(n * value for n, value in zip(tokens, values)) / sum(tokens) - at_balance)
    assert phb.get_balancer(model).metrics()["balance_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("method", LOSSES)
def test_several_forwards_before_one_backward(method, announced):
    """They need no announcement. Global-batch balancing counts in the backward, so all of them have come by then."""
    model = build("mixtral")
    batches = micro_batches(model)
    plain = step_gradient(model, batches)
    phb.patch(model, {"method": method, "coef": COEF})
    model.zero_grad()
    if announced:
        phb.get_balancer(model).begin_step(batches)
    (sum(model(**batch).loss for batch in batches) / len(batches)).backward()

    with torch.no_grad():
        routed = [forward(build("mixtral"), batch)[1] for batch in batches]

    def loss(so_far):
        return LOSSES[method]([*routed[: len(so_far) - 1], *routed[len(so_far) :], so_far[-1]])

    assert_gradient(difference(collect(model), plain), loss_gradient(build("mixtral"), batches, [(COEF, loss)]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["loss_free", "quantile", *LOSSES])
def test_models_in_bfloat16(method):
    """Gradients are those of the formula on the same model, up to its precision."""
    model = build("mixtral", dtype=torch.bfloat16)
    batches = micro_batches(model)
    phb.patch(model, {"method": method})
    plain = step_gradient(model, batches)
    phb.unpatch(model)
    strong = {"coef": 20.0} if method in LOSSES else {}
    phb.patch(model, {"method": method, **strong, "z_loss_coef": 1.0, "sequence_coef": 20.0})
    added = difference(step_gradient(model, batches), plain)
    losses = [(20.0, LOSSES[method])] if method in LOSSES else []
    reference = build("mixtral", dtype=torch.bfloat16)
    assert_gradient(added, loss_gradient(reference, batches, [*losses, (1.0, z_loss), (20.0, sequence_loss)]), 0.03)


def test_global_batch_of_one_micro_batch_is_switch():
    model = build("mixtral")
    batches = micro_batches(model, [(3, 9)])
    gradients = []
    for method in ("switch", "global_batch"):
        phb.patch(model, {"method": method, "coef": COEF})
        gradients.append(step_gradient(model, batches))
    assert_same(*gradients)


# ---------------------------------------------------------------------- one step and the next


def test_global_batch_begins_anew_with_each_step():
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"method": "global_batch", "coef": COEF})
    first = step_gradient(model, batches)
    step_gradient(model, micro_batches(model, seed=10))
    assert_same(step_gradient(model, batches), first)
