"""torch.compile: the whole patched model in one graph, compiled once, with the numbers of the eager model."""

import contextlib

import pytest
import torch
import torch._dynamo
from tiny import tiny_batch, tiny_model
from torch._dynamo.utils import counters

import hf_phibalance as phb


pytestmark = pytest.mark.slow


# one small model per scoring rule: softmax, sigmoid with a native bias, top-k before softmax
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]
SPARSE = {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse", "sparse"]}
GRADIENT = {"coef": 0.5}
BOTH = {"coef": 0.5, "bias_coef": 0.1}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def make(model_type, config, layers=2):
    """As few layers as a test can do with: every one is compiled."""
    sizes = {"num_hidden_layers": layers} | (SPARSE if model_type == "deepseek_v3" else {})
    model = tiny_model(model_type, use_cache=False, **sizes).train()
    return model if config is None else phb.patch(model, config)


def train(model, call=None, announced=True, steps=3):
    """Losses, gradients, loads and duals of some steps, and the number of graphs after each; `call` runs the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    balancer = phb.get_balancer(model)
    noted, seen = {}, []
    for step in range(steps):
        batches = [tiny_batch(model, seed=10 * step + i) for i in range(2 if announced else 1)]
        if announced:
            balancer.begin_step(batches)
        for i, batch in enumerate(batches):
            loss = (model if call is None else call)(**batch).loss
            loss.backward()
            noted[f"{step}/loss/{i}"] = loss.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                noted[f"{step}/gradient/{name}"] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
        noted |= {f"{step}/load/{name}": load for name, load in balancer.loads().items()}
        noted |= {f"{step}/state/{name}": value for name, value in balancer.state_dict().items()}
        seen.append(graphs())
    return noted, seen


def assert_same(compiled, eager):
    assert compiled.keys() == eager.keys()
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-5, msg=name)
        if "/load/" in name:
            assert torch.equal(compiled[name], eager[name]), name


@pytest.mark.parametrize(
    ("model_type", "config"),
    [*((model_type, BOTH) for model_type in FAMILIES), ("mixtral", GRADIENT)],
    ids=[*FAMILIES, "mixtral, gradient only"],
)
def test_one_graph_compiled_once_with_the_same_numbers(model_type, config):
    """`fullgraph=True`: a graph break is an error, in the forward of the model as well as in our hooks."""
    eager, _ = train(make(model_type, config))
    model = make(model_type, config)
    compiled, seen = train(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_same(compiled, eager)
    assert seen == [1, 1, 1]
    if config is BOTH:
        assert any(value.abs().max() > 1e-3 for name, value in compiled.items() if name.endswith(".bias"))


@pytest.mark.parametrize(
    ("config", "announced"),
    [
        (BOTH | {"token_mask": "labels"}, True),
        (BOTH | {"price_from": "current"}, True),
        ({"coef": 0.0, "bias_coef": 0.1}, False),
    ],
    ids=["labels", "current", "bias only, without begin_step"],
)
def test_other_settings(config, announced):
    eager, _ = train(make("mixtral", config, layers=1), announced=announced)
    model = make("mixtral", config, layers=1)
    compiled, seen = train(model, torch.compile(model, backend="eager", fullgraph=True), announced=announced)
    assert_same(compiled, eager)
    assert seen == [1, 1, 1]


def test_the_price_reaches_a_compiled_model():
    """The tests above would pass if both models ignored their prices."""
    results = {}
    for coef in (0.5, 0.0):
        model = make("mixtral", {"coef": coef}, layers=1)
        results[coef], _ = train(model, torch.compile(model, backend="eager", fullgraph=True))
    name = "1/gradient/model.layers.0.mlp.gate.weight"
    assert (results[0.5][name] - results[0.0][name]).abs().max() > 1e-3
    assert torch.equal(*(results[coef]["0/gradient/model.layers.0.mlp.gate.weight"] for coef in results))


@pytest.mark.parametrize("order", ["patch first", "compile first"])
@pytest.mark.parametrize("how", ["wrapped", "in place", "by layer"])
def test_ways_to_compile(how, order):
    def compile_(model):
        if how == "wrapped":
            return torch.compile(model, backend="eager")
        for module in [model] if how == "in place" else model.model.layers:
            module.compile(backend="eager")
        return model

    eager, _ = train(make("mixtral", BOTH))
    if order == "patch first":
        model = make("mixtral", BOTH)
        call = compile_(model)
    else:
        model = make("mixtral", None)
        call = compile_(model)
        assert phb.patch(call, BOTH) is call
    compiled, seen = train(model, call)
    assert_same(compiled, eager)
    assert seen == [2 if how == "by layer" else 1] * 3
    assert not counters["graph_break"]


def test_patching_a_model_that_has_run_compiles_it_anew():
    """... and so does a new configuration, and unpatching: no stale graph stays in use."""
    model = make("mixtral", None, layers=1)
    call = torch.compile(model, backend="eager", fullgraph=True)
    batch = tiny_batch(model)

    def gradient():
        model.zero_grad()
        call(**batch).loss.backward()
        return model.model.layers[0].mlp.gate.weight.grad.clone()

    plain = gradient()
    phb.patch(call, {"coef": 0.5, "ema_rate": 1.0})
    balancer = phb.get_balancer(call)
    assert torch.equal(gradient(), plain)  # all prices are 0 so far
    balancer.step()
    priced = gradient()
    assert not torch.equal(priced, plain)
    phb.patch(call, {"coef": 1.0, "ema_rate": 1.0})
    torch.testing.assert_close(gradient() - plain, 2 * (priced - plain), rtol=1e-3, atol=1e-6)
    phb.unpatch(call)
    assert torch.equal(gradient(), plain)


@pytest.mark.parametrize("config", [None, BOTH], ids=["unpatched", "patched"])
def test_evaluation_adds_the_graph_that_it_adds_anyway(config):
    model = make("mixtral", config, layers=1)
    call = torch.compile(model, backend="eager", fullgraph=True)
    counted = []
    for seed in range(2):
        model.train()
        call(**tiny_batch(model, seed=seed)).loss.backward()
        model.zero_grad()
        if config is not None:
            phb.get_balancer(model).step()
        model.eval()
        with torch.no_grad():
            call(**tiny_batch(model, seed=5))
    assert graphs() == 2
    if config is None:
        return
    assert phb.get_balancer(model).metrics()["tokens"] == tiny_batch(model)["attention_mask"].sum()
    for one in (call, model):
        with phb.get_balancer(model).evaluation(), torch.no_grad():
            one(**tiny_batch(model, seed=5))
            counted.append(phb.get_balancer(model).eval_metrics())
    counted[1].pop("plain_max_vio", None)  # what a plain load would choose is not counted where the model is compiled
    assert counted[0] == counted[1]
    assert graphs() == 2


@contextlib.contextmanager
def side_effects_in_forward_only():
    """What torch wants to be told before it keeps counting inside a checkpointed layer in the graph."""
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield


@pytest.mark.parametrize("told", [False, True], ids=["default", "told"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, told):
    """
    Same numbers. By default torch does not trace side effects in a checkpointed region, and counting is one: it breaks
    the graph there, and compiles the layers by themselves. Told that the recomputation need not repeat side effects,
    it makes one graph; ours need not be repeated, they must not.
    """
    reference, model = make("mixtral", BOTH), make("mixtral", BOTH)
    for one in (reference, model):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager, _ = train(reference)
    with side_effects_in_forward_only() if told else contextlib.nullcontext():
        compiled, seen = train(model, torch.compile(model, backend="aot_eager", fullgraph=told))
    assert_same(compiled, eager)
    if told:
        assert seen == [1, 1, 1]
    else:
        assert seen[0] == seen[-1] > 1
        assert all("Unsafe side effect" in reason for reason in counters["graph_break"])
