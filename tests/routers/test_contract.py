"""Routers of older transformers: undeclared, with outputs in other orders, or with a block that does the top-k."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from charging import COEF, by_weights, gradients
from tiny import set_prices, tiny_batch, tiny_model
from torch import nn

import hf_phibalance as phb
from hf_phibalance.routers import find_routers


E, K, H, I = 8, 2, 32, 16  # experts, top-k, hidden size, size of an expert  # noqa: E741


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, H, I) * 0.2)
        self.down = nn.Parameter(torch.randn(E, I, H) * 0.2)

    def forward(self, hidden, top_k_index, top_k_weights):
        every = torch.einsum("eti,eih->teh", torch.einsum("th,ehi->eti", hidden, self.up).relu(), self.down)
        picked = every.gather(1, top_k_index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return (picked * top_k_weights.unsqueeze(-1)).sum(1)


class ChoosingExperts(Experts):
    """As Aria before 5.20: the experts get the logits."""

    def forward(self, hidden, router_logits):
        weights, chosen = torch.topk(router_logits, K)
        return super().forward(hidden, chosen, weights.softmax(-1))


class Gate(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H) * 0.5)
        self.order, self.top_k = order, K

    def forward(self, hidden):
        logits = F.linear(hidden, self.weight)
        weights, chosen = torch.topk(logits.softmax(-1), K)
        parts = {"logits": logits, "weights": weights, "chosen": chosen}
        return tuple(parts[name] for name in self.order)


class Block(nn.Module):
    """A block whose router returns its selection. Subclasses change the router, or the order of its outputs."""

    order, make_gate, sigmoid = ("logits", "weights", "chosen"), Gate, False

    def __init__(self):
        super().__init__()
        self.gate = self.make_gate(self.order)
        self.experts = Experts()
        self.top_k = K

    def forward(self, hidden):
        flat = hidden.reshape(-1, H)
        parts = dict(zip(self.order, self.gate(flat)))
        return self.experts(flat, parts["chosen"], parts["weights"]).view_as(hidden)


class IndicesFirst(Block):
    order = ("chosen", "weights", "logits")


class IndicesSecond(Block):
    order = ("logits", "chosen", "weights")


class NoLogits(Block):
    order = ("weights", "chosen")


class ProbsGate(Gate):
    def forward(self, hidden):
        router_logits = F.linear(hidden, self.weight)
        router_logits = torch.nn.functional.softmax(router_logits, dim=-1)
        weights, chosen = torch.topk(router_logits, K)
        return router_logits, weights, chosen


class Probs(Block):
    """As Mixtral before 5.6: it returns probabilities instead of logits."""

    make_gate = ProbsGate


class ScatteredGate(Gate):
    """As Llama 4: it returns the weights in the places of their experts, and no selection."""

    def forward(self, hidden):
        logits = F.linear(hidden, self.weight)
        values, chosen = torch.topk(logits, K)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, values)
        scores = torch.sigmoid(scores.float()).to(scores.dtype)
        return scores, logits


class Scattered(Block):
    make_gate, sigmoid = ScatteredGate, True

    def forward(self, hidden):
        flat = hidden.reshape(-1, H)
        weights, chosen = self.gate(flat)[0].topk(K)
        return self.experts(flat, chosen, weights).view_as(hidden)


class LinearGate(Block):
    """As Jamba: the router is a linear layer, and the block does the top-k."""

    @staticmethod
    def make_gate(order):
        gate = nn.Linear(H, E, bias=False)
        nn.init.normal_(gate.weight, std=0.5)
        return gate

    def route_tokens_to_experts(self, router_logits):
        weights, chosen = torch.topk(router_logits.softmax(-1), self.top_k)
        return chosen, weights

    def forward(self, hidden):
        flat = hidden.reshape(-1, H)
        return self.experts(flat, *self.route_tokens_to_experts(self.gate(flat))).view_as(hidden)


class ReadGate(LinearGate):
    """As DeepSeek-V2 before 5.14: the block reads the weight of its gate, and never calls it."""

    def forward(self, hidden):
        flat = hidden.reshape(-1, H)
        chosen, weights = self.route_tokens_to_experts(F.linear(flat, self.gate.weight))
        return self.experts(flat, top_k_index=chosen, top_k_weights=weights).view_as(hidden)


class NativeBias(LinearGate):
    """As DeepSeek-V3 before 5.14: sigmoid scores, and a selection bias in the block."""

    sigmoid = True

    def __init__(self):
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def route_tokens_to_experts(self, router_logits):
        scores = router_logits.sigmoid()
        chosen = torch.topk(scores + self.e_score_correction_bias, self.top_k)[1]
        return chosen, scores.gather(1, chosen)


class ExpertsChoose(LinearGate):
    def __init__(self):
        super().__init__()
        self.experts = ChoosingExperts()

    def forward(self, hidden):
        flat = hidden.reshape(-1, H)
        return self.experts(flat, self.gate(flat)).view_as(hidden)


def each(*blocks):
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.__name__)


ALL = each(
    Block, IndicesFirst, IndicesSecond, NoLogits, Probs, Scattered, LinearGate, ReadGate, NativeBias, ExpertsChoose
)


def model_with(block):
    """A tiny Llama with `block`s as MLPs, in which transformers declares no router."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": H, "intermediate_size": I, "num_hidden_layers": 2, "vocab_size": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
        model = LlamaForCausalLM(config).train()
        for layer in model.model.layers:
            layer.mlp = block()
    return model


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_is_found_charged_and_counted(block, checkpointing):
    model = model_with(block)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    batch = tiny_batch(model)
    task = gradients(model, batch)
    phb.patch(model, {"coef": COEF, "ema_rate": 1.0})
    balancer = set_prices(model)
    assert balancer.layer_names == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    prices = [price.clone() for price in balancer.prices().values()]
    handed = {}
    for i, layer in enumerate(model.model.layers):

        def note(module, args, kwargs, i=i):
            handed.setdefault(i, [*args, *kwargs.values()][1])

        layer.mlp.experts.register_forward_pre_hook(note, with_kwargs=True)
    charged = gradients(model, batch)
    balancer.step()
    mask = batch["attention_mask"].reshape(-1).bool()
    for i, (_, load) in enumerate(balancer.loads().items()):
        chosen = handed[i] if not handed[i].is_floating_point() else handed[i].topk(K).indices
        assert torch.equal(load, torch.bincount(chosen[mask].flatten(), minlength=E).float())
    phb.unpatch(model)
    model.gradient_checkpointing_disable()
    gates = [(layer.mlp, layer.mlp.gate.weight, price) for layer, price in zip(model.model.layers, prices)]
    expected = by_weights(model, batch, gates, "sigmoid" if block.sigmoid else "softmax")
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for name, gradient in charged.items():
        added = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient - task[name], added, rtol=1e-3, atol=1e-5)
    after = gradients(model, batch)
    assert all(torch.equal(after[name], task[name]) for name in task)


@pytest.mark.slow
@ALL
def test_bias_selects(block):
    model = model_with(block)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    biases = balancer.biases()
    for bias in biases.values():
        bias.zero_()[-K:] = 50.0
    balancer.set_biases(biases)
    model(**tiny_batch(model)).loss.backward()
    balancer.step()
    for site in balancer.sites:
        load = balancer.loads()[site.name]
        assert load[-K:].sum() == load.sum() > 0
        assert bool(site.native_bias) == (block is NativeBias)


@pytest.mark.slow
@each(LinearGate, ReadGate, NativeBias)
def test_choice_of_the_block_compiles_copies_and_pickles(block):
    model = phb.patch(model_with(block), {"coef": COEF})
    set_prices(model)
    batch = tiny_batch(model)
    eager = gradients(model, batch)
    loads = phb.get_balancer(model).now.counts.load.clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert phb.get_balancer(twin) is not phb.get_balancer(model)
        same = gradients(twin, batch)
        assert all(torch.equal(same[name], eager[name]) for name in eager)
    phb.get_balancer(model).discard_step()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    graph = gradients(compiled, batch)
    for name in eager:
        torch.testing.assert_close(graph[f"_orig_mod.{name}"], eager[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(phb.get_balancer(model).now.counts.load, loads)


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize(
    "target", [{"target_modules": ["gate"]}, {"modules_to_save": ["gate"], "target_modules": ["q_proj"]}]
)
def test_adapter_on_a_linear_gate_is_priced_with_what_it_adds(target, patched):
    peft = pytest.importorskip("peft")
    model = model_with(LinearGate)
    batch = tiny_batch(model)
    if patched == "before":
        phb.patch(model, {"coef": COEF})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **target))
    phb.patch(wrapped, {"coef": COEF})
    balancer = set_prices(wrapped)
    assert balancer.layer_names == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    charged = gradients(wrapped, batch)
    phb.unpatch(wrapped)
    task = gradients(wrapped, batch)
    mask, term = batch["attention_mask"].reshape(-1).float(), []
    for layer, price in zip(model.model.layers, balancer.prices().values()):
        layer.mlp.gate.register_forward_hook(
            lambda m, a, logits, q=price: term.append(((logits.softmax(-1) * q).sum(-1) * mask).sum() / mask.sum())
        )
    wrapped.zero_grad()
    wrapped(**batch)
    (COEF * sum(term)).backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(charged[name] - task[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_declared_blocks_are_looked_into(monkeypatch):
    """As EXAONE-MoE and Llama 4 before 5.20: the declared module contains the router."""
    model = tiny_model("deepseek_v3").train()
    block = type(find_routers(model)[0].parent)
    declaring = [c for c in type(model).__mro__ if "_can_record_outputs" in vars(c)]
    for cls in {*declaring, *(c for c in type(model.model).__mro__ if "_can_record_outputs" in vars(c))}:
        monkeypatch.setattr(cls, "_can_record_outputs", {"router_logits": block})
    sites = find_routers(model)
    assert [site.name for site in sites] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert {type(module).__name__ for site in sites for module in site.modules} == {"DeepseekV3TopkRouter"}


def test_what_is_no_router_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=H, intermediate_size=I, num_hidden_layers=1, vocab_size=64))
    with pytest.raises(ValueError, match="has no router: transformers"):
        phb.patch(model)


def test_two_tensors_as_wide_as_the_experts_are_refused():
    model = model_with(IndicesFirst)
    for layer in model.model.layers:
        layer.mlp.gate.forward = lambda hidden: (None, torch.zeros(len(hidden), E), torch.zeros(len(hidden), E))
    phb.patch(model)
    with pytest.raises(ValueError, match="2 tensors as wide as its 8 experts"):
        model(**tiny_batch(model))
