"""Every router-bearing causal-LM family of transformers, against the unpatched model and against autograd."""

import contextlib

import pytest
import torch
from tiny import MODEL_TYPES, set_prices, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs


FAMILIES = phb.supported_families()
BALANCED = [model_type for model_type in MODEL_TYPES if not FAMILIES[model_type].refused]
BIASED = [model_type for model_type in BALANCED if not FAMILIES[model_type].selection_bias.startswith("none")]
NO_CHECKPOINTING = {"jetmoe"}


def build(model_type, **overrides):
    model = tiny_model(model_type, **overrides).train()
    return model, tiny_batch(model)


def gradients(model, batch):
    """Loss, logits and the gradient of every parameter of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**batch)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), grads


@contextlib.contextmanager
def recorded(balancer):
    """What every router returned and was given, `{layer name: [(logits, output)]}`, noted by hooks of the test."""
    seen, handles = {}, []
    for site in balancer.sites:
        index = site.kind.index

        def note(module, args, output, name=site.name, index=index):
            logits = output[index] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append((logits, output))

        handles.append(site.modules[0].register_forward_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left[:2], right[:2])) and (
        left[2].keys() == right[2].keys() and all(torch.equal(left[2][name], right[2][name]) for name in left[2])
    )


def test_every_declared_family_is_either_balanced_or_refused_with_a_reason():
    assert set(MODEL_TYPES) == set(FAMILIES)
    assert len(BALANCED) >= 60
    model, _ = build("doge")
    before = dict(vars(model))
    with pytest.raises(ValueError, match="product keys"):
        phb.patch(model)
    assert vars(model) == before


@pytest.mark.parametrize("model_type", BALANCED)
def test_zero_strength_and_unpatch_change_nothing(model_type):
    model, batch = build(model_type)
    config, attributes = model.config.to_dict(), set(vars(model))
    plain = gradients(model, batch)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.0})
    assert same(gradients(model, batch), plain)
    phb.unpatch(model)
    phb.patch(model, {"coef": 3.0})
    set_prices(model)
    assert not same(gradients(model, batch), plain)
    phb.unpatch(model)
    assert same(gradients(model, batch), plain)
    assert model.config.to_dict() == config and set(vars(model)) == attributes
    ours = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in ours if type(h).__module__.startswith("hf_phibalance")]


@pytest.mark.parametrize("model_type", BALANCED)
def test_gradient_is_that_of_the_definition(model_type):
    """Price gradient of all parameters == autograd of coef · Σ_layers mean over counted tokens of ⟨q, p⟩."""
    model, batch = build(model_type)
    coef = 2.0
    phb.patch(model, {"coef": 0.0})
    balancer = phb.get_balancer(model)
    task = gradients(model, batch)[2]
    prices = set_prices(model).prices()
    model.zero_grad()
    with recorded(balancer) as seen:
        model(**batch)
    mask = batch["attention_mask"].reshape(-1).float()
    assert 0 < mask.sum() < mask.numel()
    term = 0.0
    for site in balancer.sites:
        ((logits, _),) = seen[site.name]
        probs = routing_probs(logits, site.scoring)
        term = term + ((probs * prices[site.name]).sum(-1) * mask).sum() / mask.sum()
    (coef * term).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    phb.unpatch(model)
    phb.patch(model, {"coef": coef})
    set_prices(model)
    charged = gradients(model, batch)[2]
    assert any(e.abs().max() > 1e-3 for e in expected.values())
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("model_type", BALANCED)
def test_probabilities_are_those_the_router_uses(model_type):
    """The weights of the chosen experts are proportional to the routing probabilities that we price."""
    if model_type == "phimoe":
        pytest.skip("sparsemixer's multipliers are samples, not probabilities")
    model, batch = build(model_type)
    phb.patch(model, {"coef": 0.0})
    balancer = phb.get_balancer(model)
    with recorded(balancer) as seen, torch.no_grad():
        model.eval()(**batch)
    for site in balancer.sites:
        logits, output = seen[site.name][0]
        assert logits.shape[-1] == site.num_experts
        probs = routing_probs(logits, site.scoring)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
        weights, chosen = chosen_weights(site, probs, output)
        ratio = weights / probs.gather(-1, chosen)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)


def chosen_weights(site, probs, output):
    """Weights and indices `(T, k)` as the family returns them, in its own layout."""
    kind = site.kind.target.__name__
    if kind == "DbrxRouter":
        return site.parent.route_tokens_to_experts(output)
    if kind == "Llama4Router":
        weights, chosen = output[0].topk(site.top_k)
        return weights, chosen
    if kind == "JetMoeTopKGating":
        chosen = output[4].topk(site.top_k).indices  # batch_gates come sorted by expert
        weights = torch.empty(chosen.numel()).index_copy_(0, output[0], output[2])
        return weights.view_as(chosen), chosen
    weights, chosen = output[1], output[2]
    if kind == "Gemma4TextRouter":
        weights = weights / site.modules[0].per_expert_scale[chosen]
    if kind == "ZayaRouter":
        skipped = weights == 0
        weights, chosen = weights.masked_fill(skipped, 1.0), chosen
        return torch.where(skipped, probs.gather(-1, chosen), weights), chosen
    return weights.float(), chosen


@pytest.mark.parametrize("model_type", BALANCED)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_counts_equal_a_naive_count(model_type, checkpointing):
    """Loads and mean probabilities == loops over the recorded router outputs, padding left out, nothing counted twice."""
    if checkpointing is not None and model_type in NO_CHECKPOINTING:
        pytest.skip(f"{model_type} has no gradient checkpointing")
    model, batch = build(model_type)
    phb.patch(model, {"coef": 0.5, "ema_rate": 1.0})
    balancer = phb.get_balancer(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with recorded(balancer) as seen:
        model(**batch).loss.backward()
    balancer.step()
    mask = batch["attention_mask"].reshape(-1).bool()
    for site in balancer.sites:
        logits, output = seen[site.name][0]
        counts = [0] * site.num_experts
        probs = routing_probs(logits.detach(), site.scoring)
        for t, row in enumerate(naive_choice(site, probs, output)):
            for expert in row if mask[t] else ():
                counts[expert] += 1
        assert balancer.loads()[site.name].tolist() == counts
        torch.testing.assert_close(balancer.means()[site.name], probs[mask].mean(0), rtol=1e-5, atol=1e-6)


def naive_choice(site, probs, output):
    """The experts of each token: as returned, or for routers that do not return them, from what they do return."""
    kind = site.kind.target.__name__
    if kind == "Llama4Router":
        return [row.nonzero().flatten().tolist() for row in output[0]]
    if kind == "JetMoeTopKGating":
        by_expert = torch.repeat_interleave(torch.arange(site.num_experts), torch.tensor(output[3]))
        choice = [[] for _ in range(len(probs))]
        for token, expert in zip(output[1].tolist(), by_expert.tolist()):
            choice[token].append(expert)
        return choice
    if kind == "DbrxRouter":
        return site.parent.route_tokens_to_experts(output)[1].tolist()
    if kind == "ZayaRouter":
        weights, chosen = output[1].flatten().tolist(), output[2].flatten().tolist()
        return [[expert if weight else site.num_experts - 1] for weight, expert in zip(weights, chosen)]
    return output[2].tolist()


@pytest.mark.parametrize("model_type", BIASED)
def test_bias_selects_and_leaves_weights_unbiased(model_type):
    """A strong bias on two experts sends every token there, with weights from the unbiased probabilities."""
    model, batch = build(model_type)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    biases = balancer.biases()
    for site in balancer.sites:
        biases[site.name].zero_()[: site.top_k] = 50.0
    balancer.set_biases(biases)
    with recorded(balancer) as seen:
        model(**batch).loss.backward()
    balancer.step()
    for site in balancer.sites:
        load = balancer.loads()[site.name]
        assert load[: site.top_k].sum() == load.sum() > 0
        logits, output = seen[site.name][0]
        if site.kind.target.__name__ in ("DbrxRouter", "JetMoeTopKGating"):
            continue  # these do not return weights and choice side by side
        probs = routing_probs(logits.detach(), site.scoring)
        weights, chosen = chosen_weights(site, probs, output)
        ratio = weights / probs.gather(-1, chosen)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
        assert bool(site.native_bias) == (FAMILIES[model_type].selection_bias == "native")


@pytest.mark.parametrize("model_type", BIASED)
def test_bias_step_is_the_price_of_the_load(model_type):
    model, batch = build(model_type)
    start = {}
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.01, "ema_rate": 0.5})
    balancer = phb.get_balancer(model)
    start = balancer.biases()
    model(**batch).loss.backward()
    balancer.step()
    for site in balancer.sites:
        experts = site.num_experts
        load = balancer.loads()[site.name].double()
        mean = 0.5 / experts + 0.5 * load / load.sum()
        price = (experts * mean).log()
        expected = start[site.name] - 0.01 * (price - price.mean())
        torch.testing.assert_close(balancer.biases()[site.name], expected.float(), rtol=1e-4, atol=1e-6)
        if site.native_bias:
            torch.testing.assert_close(site.read_native_bias().float(), balancer.biases()[site.name])
