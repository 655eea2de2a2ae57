"""Every causal-LM family of transformers with routers, against the unpatched model, autograd and loops."""

import contextlib

import pytest
import torch
from charging import assert_charged_as_defined, priced
from tiny import MODEL_TYPES, set_prices, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs


pytestmark = pytest.mark.slow


FAMILIES = phb.supported_families()
BALANCED = [model_type for model_type in MODEL_TYPES if not FAMILIES[model_type].refused]
BIASED = [model_type for model_type in BALANCED if not FAMILIES[model_type].selection_bias.startswith("none")]
NO_CHECKPOINTING = {"jetmoe"}


def build(model_type, config=None):
    """A tiny model, patched with `config`, and a batch with padding."""
    model = tiny_model(model_type).train()
    return (model if config is None else phb.patch(model, config)), tiny_batch(model)


def results(model, batch):
    """Loss, logits and gradients of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**batch)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@contextlib.contextmanager
def recorded(balancer):
    """The outputs of every router, `{layer name: [(logits, output)]}`, from hooks of the test."""
    seen, handles = {}, []
    for site in balancer.sites:

        def note(module, args, output, name=site.name, index=site.kind.index):
            logits = output[index] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append((logits, output))

        handles.append(site.modules[0].register_forward_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


def chosen_weights(site, probs, output):
    """Weights and indices `(T, k)` in the family's own layout."""
    kind = site.kind.target.__name__
    if kind == "DbrxRouter":
        return site.parent.route_tokens_to_experts(output)
    if kind == "Llama4Router":
        return output[0].topk(site.top_k)
    if kind == "JetMoeTopKGating":
        chosen = output[4].topk(site.top_k).indices  # batch_gates are sorted by expert
        weights = torch.empty(chosen.numel()).index_copy_(0, output[0], output[2])
        return weights.view_as(chosen), chosen
    weights, chosen = output[1], output[2]
    if kind == "Gemma4TextRouter":
        weights = weights / site.modules[0].per_expert_scale[chosen]
    if kind == "ZayaRouter":
        skipped = weights == 0
        return torch.where(skipped, probs.gather(-1, chosen), weights.masked_fill(skipped, 1.0)), chosen
    return weights.float(), chosen


def naive_choice(site, output):
    """The experts of each token: as returned, or computed from the output."""
    kind = site.kind.target.__name__
    if kind == "Llama4Router":
        return [row.nonzero().flatten().tolist() for row in output[0]]
    if kind == "JetMoeTopKGating":
        by_expert = torch.repeat_interleave(torch.arange(site.num_experts), torch.tensor(output[3]))
        choice = {}
        for token, expert in zip(output[1].tolist(), by_expert.tolist()):
            choice.setdefault(token, []).append(expert)
        return [choice[token] for token in sorted(choice)]
    if kind == "DbrxRouter":
        return site.parent.route_tokens_to_experts(output)[1].tolist()
    if kind == "ZayaRouter":
        weights, chosen = output[1].flatten().tolist(), output[2].flatten().tolist()
        return [[expert if weight else site.num_experts - 1] for weight, expert in zip(weights, chosen)]
    return output[2].tolist()


def assert_weights_are_unbiased(site, logits, output, **tolerance):
    """The weights of the chosen experts are proportional to the routing probabilities that are priced."""
    probs = routing_probs(logits.detach(), site.scoring)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
    weights, chosen = chosen_weights(site, probs, output)
    ratio = weights / probs.gather(-1, chosen)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), **tolerance)


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
    plain = results(model, batch)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.0})
    assert same(results(model, batch), plain)
    phb.unpatch(model)
    phb.patch(model, {"coef": 3.0})
    set_prices(model)
    assert not same(results(model, batch), plain)
    phb.unpatch(model)
    assert same(results(model, batch), plain)
    assert model.config.to_dict() == config and set(vars(model)) == attributes
    left = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in left if type(h).__module__.startswith("hf_phibalance")]


@pytest.mark.parametrize("model_type", BALANCED)
def test_gradient_is_that_of_the_definition(model_type):
    """The added gradient of all parameters is autograd's of coef · Σ_layers mean over counted tokens of ⟨q, p⟩."""
    model = priced(model_type)
    assert_charged_as_defined(model, tiny_batch(model))


@pytest.mark.parametrize("model_type", BALANCED)
def test_probabilities_are_those_the_router_uses(model_type):
    if model_type == "phimoe":
        pytest.skip("sparsemixer's multipliers are samples, not probabilities")
    model, batch = build(model_type, {"coef": 0.0})
    balancer = phb.get_balancer(model)
    with recorded(balancer) as seen, torch.no_grad():
        model.eval()(**batch)
    for site in balancer.sites:
        assert seen[site.name][0][0].shape[-1] == site.num_experts
        assert_weights_are_unbiased(site, *seen[site.name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", BALANCED)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_counts_equal_a_naive_count(model_type, checkpointing):
    """Loads and mean probabilities are those of loops over the routers' outputs, without padding, each token once."""
    if checkpointing is not None and model_type in NO_CHECKPOINTING:
        pytest.skip(f"{model_type} has no gradient checkpointing")
    model, batch = build(model_type, {"coef": 0.5, "ema_rate": 1.0})
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
        for row, is_token in zip(naive_choice(site, output), mask):
            for expert in row if is_token else ():
                counts[expert] += 1
        assert balancer.loads()[site.name].tolist() == counts
        probs = routing_probs(logits.detach(), site.scoring)
        torch.testing.assert_close(balancer.means()[site.name], probs[mask].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", BIASED)
def test_bias_selects_and_leaves_weights_unbiased(model_type):
    """A strong bias on the first experts sends every token there, with weights from the unbiased probabilities."""
    model, batch = build(model_type, {"coef": 0.0, "bias_coef": 0.1})
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
        assert bool(site.native_bias) == (FAMILIES[model_type].selection_bias == "native")
        if site.kind.target.__name__ not in ("DbrxRouter", "JetMoeTopKGating"):  # these return them apart
            assert_weights_are_unbiased(site, *seen[site.name][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", BIASED)
def test_bias_step_is_the_price_of_the_load(model_type):
    model, batch = build(model_type, {"coef": 0.0, "bias_coef": 0.01, "ema_rate": 0.5})
    balancer = phb.get_balancer(model)
    start = balancer.biases()
    model(**batch).loss.backward()
    balancer.step()
    for site in balancer.sites:
        load = balancer.loads()[site.name].double()
        price = (0.5 + 0.5 * site.num_experts * load / load.sum()).log()
        expected = start[site.name] - 0.01 * (price - price.mean())
        torch.testing.assert_close(balancer.biases()[site.name], expected.float(), rtol=1e-4, atol=1e-6)
        if site.native_bias:
            torch.testing.assert_close(site.read_native_bias().float(), balancer.biases()[site.name])
