"""Which forwards count and pay: those of training, each once; evaluations apart, generation and single layers never."""

import json
import math

import pytest
import torch
from charging import COEF, collect, gradients, priced
from checks import assert_same
from references import naive_figures, routed
from steps import EXTRA_COEF, METHODS, build, micro_batches, step_gradient
from tiny import set_prices, tiny_batch, tiny_model

import hf_phibalance as phb


def tokens_of(balancer):
    """Tokens counted since the last step, `None` if there was no training."""
    before = balancer.steps
    balancer.step()
    return None if balancer.steps == before else balancer.metrics()["tokens"]


def test_only_training_forwards_count_and_pay():
    model = priced()
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    before = balancer.state_dict()
    with torch.no_grad():
        model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    assert tokens_of(balancer) is None
    assert_same(balancer.state_dict(), before)

    evaluated = gradients(model, batch)  # gradients in eval mode, say for an attribution
    plain = tiny_model("mixtral")
    assert_same(evaluated, gradients(plain, batch))
    assert tokens_of(balancer) is None

    model.train()
    model(**batch)  # for its loss only: its graph is gone
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    assert tokens_of(balancer) is None
    assert_same(balancer.state_dict(), before)
    assert any(not torch.equal(g, evaluated[name]) for name, g in gradients(model, batch).items())
    assert tokens_of(balancer) == batch["attention_mask"].sum()


def test_evaluation_counts_apart_and_generation_does_not():
    model = priced("mixtral", {"bias_coef": 0.1})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    gradients(model, batch)
    before, step_metrics = balancer.state_dict(), balancer.metrics()
    model.eval()
    with balancer.evaluation():
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        assert balancer.eval_metrics() == {}
        with torch.no_grad():
            for seed in range(2):
                model(**tiny_batch(model, seed=seed))
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        assert balancer.eval_metrics()["tokens"] == 2 * batch["attention_mask"].sum()
    with pytest.raises(RuntimeError, match=r"inside `with balancer.evaluation"):
        balancer.eval_metrics()
    assert balancer.metrics() == step_metrics
    assert_same(balancer.state_dict(), before)
    assert tokens_of(balancer) == batch["attention_mask"].sum()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_evaluation_of_a_generation(model_type):
    """Prompts and new tokens once, padding and what comes after the end of a row never; by a forward of all that was generated."""
    model, plain = phb.patch(tiny_model(model_type), {"coef": COEF, "bias_coef": 0.1}), tiny_model(model_type)
    prompts = tiny_batch(model, 3, 6)
    prompts = {name: prompts[name].flip(1) for name in ("input_ids", "attention_mask")}  # padding on the left
    free = plain.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config.eos_token_id = end = int(free[0, 8])  # of the first row, the third new token
    balancer = phb.get_balancer(model)
    with balancer.evaluation(generation=True):
        for _ in range(2):  # a second generation begins anew
            made = model.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)
        metrics = balancer.eval_metrics(per_layer=16)
    assert made.shape == free.shape  # another row went on to the end

    fed = made[:, :-1]  # nothing has been computed of the last token
    ended = (fed[:, 6:] == end).long().cumsum(1)
    new = ended - (fed[:, 6:] == end).long() == 0  # the end itself is fed as well
    mask = torch.cat([prompts["attention_mask"].bool(), new], 1)
    assert (~mask[:, 6:]).any()
    attended = torch.cat([prompts["attention_mask"], torch.ones_like(fed[:, 6:])], 1)
    position_ids = (attended.cumsum(1) - 1).clamp(min=0)
    with routed(plain) as seen:
        plain(input_ids=fed, attention_mask=attended, position_ids=position_ids)
    counts = {
        name: torch.bincount(chosen[mask.flatten()].flatten(), minlength=8).tolist()
        for name, ((_, chosen),) in seen.items()
    }
    expected = naive_figures(counts)
    assert metrics["tokens"] == 2 * mask.sum()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_evaluation_between_forward_and_backward_does_not_disturb():
    for checkpointing in (None, False, True):
        model, reference = priced(), priced()
        for one in (model, reference):
            if checkpointing is not None:
                one.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        batch = tiny_batch(model)
        expected = gradients(reference, batch)
        output = model(**batch)
        model.eval()
        with phb.get_balancer(model).evaluation(), torch.no_grad():
            model(**tiny_batch(model, seed=1))
        model.train()
        output.loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)
        phb.get_balancer(model).step()
        phb.get_balancer(reference).step()
        assert_same(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


def test_a_layer_called_by_itself_neither_counts_nor_fails():
    model = priced("mixtral", {"bias_coef": 0.1})
    gradients(model, tiny_batch(model))
    hidden = torch.randn(1, 5, 32, requires_grad=True)
    for one in (model, phb.unpatch(priced("mixtral", {"bias_coef": 0.1}))):
        with torch.no_grad():
            one.model.layers[1].mlp(hidden)
    model.model.layers[1].mlp(hidden).sum().backward()
    own = hidden.grad.clone()
    hidden.grad = None
    set_prices(model, seed=7)  # other prices, same gradient
    model.model.layers[1].mlp(hidden).sum().backward()
    assert torch.equal(hidden.grad, own)
    assert tokens_of(phb.get_balancer(model)) == tiny_batch(model)["attention_mask"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_plain_finite_numbers(method):
    model = build("qwen3_moe")
    phb.patch(model, {"method": method, **EXTRA_COEF})
    for seed in range(2):
        step_gradient(model, micro_batches(model, seed=10 * seed))
        metrics = phb.get_balancer(model).metrics()
        assert json.loads(json.dumps(metrics)) == metrics
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["max_vio"] > 0 and metrics["tokens"] > 0


@pytest.mark.parametrize("additive", [True, False])
def test_a_mask_of_packed_sequences_tells_padding_apart(additive):
    """Two sequences in each row, then padding, attended to as collators of packed batches have it: (B, 1, S, S)."""
    model, plain = priced(), tiny_model("mixtral").train()
    batch = tiny_batch(model, seq=12)
    sequence_BS = batch["attention_mask"] * (1 + (torch.arange(12) >= 4).long())
    allowed = (sequence_BS[:, None, :, None] == sequence_BS[:, None, None]) & (sequence_BS != 0)[:, None, None]
    allowed &= torch.ones(12, 12, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min) if additive else allowed
    packed = {**batch, "attention_mask": mask}

    logits = {}
    for site in phb.get_balancer(model).sites:
        router = plain.get_submodule(site.name)
        router.register_forward_hook(lambda _, args, output, name=site.name: logits.update({name: output[0]}))
    task = gradients(plain, packed)
    charged = gradients(model, packed)
    plain.zero_grad()
    plain(**packed)
    counted = (sequence_BS != 0).reshape(-1)
    prices = phb.get_balancer(model).prices()
    sum((logits[name].softmax(-1)[counted] @ prices[name]).mean() for name in prices).mul(COEF).backward()
    for name, gradient in collect(plain).items():
        torch.testing.assert_close(charged[name] - task[name], gradient, rtol=1e-4, atol=1e-6)
    assert tokens_of(phb.get_balancer(model)) == counted.sum() < counted.numel()
