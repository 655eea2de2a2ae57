"""One thread serves while another trains: the training neither sees it nor is seen by it."""

import contextlib
import sys
import threading

import pytest
import torch
from charging import collect, gradients, priced
from checks import assert_same
from steps import CHECKPOINTING
from tiny import tiny_batch

import hf_phibalance as phb


pytestmark = pytest.mark.slow


PROMPT = torch.arange(5, 11).view(1, -1)
PLACES = {  # where in the forward of one thread the other one comes in
    "before the backbone": lambda model: model.model,
    "before the routers": lambda model: model.model.embed_tokens,
    "in a router": lambda model: model.model.layers[1].mlp.gate,
    "after the routers": lambda model: model.lm_head,
}


def build(model_type="mixtral", checkpointing="none", **config):
    model = priced(model_type, {"bias_coef": 0.2, **config})
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    gradients(model, tiny_batch(model, seed=7))
    phb.get_balancer(model).step()  # a bias that matters
    return model


def generate(model):
    with torch.no_grad():
        return model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0)


def train(model, steps=2):
    """Gradients, loads and duals of some steps of two micro-batches each."""
    balancer, seen = phb.get_balancer(model), {}
    for step in range(steps):
        batches = [tiny_batch(model, seed=2 * step + i) for i in range(2)]
        model.zero_grad()
        balancer.begin_step(batches)
        for batch in batches:
            model(**batch).loss.backward()
        balancer.step()
        seen[step] = {"gradient": collect(model), "load": balancer.loads(), "duals": balancer.state_dict()}
    return seen


def in_thread(function):
    """What `function()` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@contextlib.contextmanager
def interrupted(module, function, in_training):
    """`function()` runs at every call of `module` by this thread, in training or in serving."""
    here, running = threading.get_ident(), []

    def come_in(*_):
        if threading.get_ident() == here and torch.is_grad_enabled() is in_training and not running:
            running.append(True)
            function()
            running.pop()

    handle = module.register_forward_pre_hook(come_in, prepend=True)  # before ours
    yield
    handle.remove()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("model_type", "checkpointing", "config"),
    [
        ("mixtral", "none", {}),
        ("mixtral", "none", {"token_mask": "labels"}),
        ("mixtral", "non_reentrant", {}),
        ("deepseek_v3", "none", {}),
        ("mixtral", "none", {"method": "pooled", "bias_coef": 0.0}),
    ],
    ids=["softmax", "labels", "checkpointing", "native_bias", "pooled"],
)
def test_a_generation_in_the_middle_of_a_training_forward(model_type, checkpointing, config, place):
    alone, model = (build(model_type, checkpointing, **config) for _ in range(2))
    generated = []

    def serve():
        generated.append(in_thread(lambda: generate(model)))

    expected = generate(alone)
    with interrupted(PLACES[place](model), serve, in_training=True):
        one = train(model, steps=1)
    assert len(generated) >= 2
    if model_type != "deepseek_v3":  # no weight has moved, and no bias before the step was closed
        assert all(torch.equal(tokens, expected) for tokens in generated)
    assert_same(one, train(alone, steps=1))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_a_training_step_in_the_middle_of_a_generation(place, token_mask):
    alone, model = (build(token_mask=token_mask) for _ in range(2))
    seen = []

    def learn():
        if not seen:
            seen.append(in_thread(lambda: train(model)))

    with interrupted(PLACES[place](model), learn, in_training=False):
        generate(model)
    assert_same(seen[0], train(alone))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_generation_in_the_middle_of_a_backward(checkpointing):
    alone, model = (build(checkpointing=checkpointing) for _ in range(2))
    served = []

    def serve(grad):
        served.append(in_thread(lambda: generate(model)))

    weight = model.model.layers[1].mlp.gate.weight
    handle = weight.register_hook(serve)
    seen = train(model)
    handle.remove()
    assert len(served) == 4
    assert_same(seen, train(alone))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_serving_all_the_time_changes_no_bit(model_type):
    """Threads that generate without pause, switched as often as Python can, while another trains."""
    alone, model = build(model_type), build(model_type)
    expected, stop, served = train(alone, steps=4), threading.Event(), []

    def serve():
        while not stop.is_set():
            served.append(generate(model).shape)

    interval, threads = sys.getswitchinterval(), [threading.Thread(target=serve) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while not served:
            stop.wait(0.01)
        seen, before = train(model, steps=4), len(served)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert before > 2 and set(served) == {(1, 8)}
    assert_same(seen, expected)


def test_replaying_holds_in_its_thread_only():
    """Choices given from outside are those of the training; a thread that serves meanwhile selects with its bias."""
    model = build()
    balancer = phb.get_balancer(model)
    expected = generate(model)
    biases = {"biased": 0, "unbiased": 0}

    def look(*_):
        biases["unbiased" if balancer.forwards.selection_bias(1) is None else "biased"] += 1

    model.model.layers[1].mlp.gate.register_forward_pre_hook(look)
    with balancer.replaying():
        assert torch.equal(in_thread(lambda: generate(model)), expected)
        assert biases == {"biased": 2, "unbiased": 0}
        generate(model)  # the same thread: old log-probabilities of what was replayed, for instance
        gradients(model, tiny_batch(model))
    assert biases == {"biased": 2, "unbiased": 3}
    balancer.discard_step()
    in_thread(lambda: generate(model))
    assert biases["biased"] == 4


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_generation_interrupted_between_forward_and_backward(checkpointing):
    """Ctrl-C runs no hook of a module, so the forward that it ended is not closed: recomputation must not think it still is."""
    alone, model = (build(checkpointing=checkpointing) for _ in range(2))
    batch = tiny_batch(model)

    def stop(*_):
        raise KeyboardInterrupt

    model.zero_grad()
    loss = model(**batch).loss
    handle = model.model.layers[2].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    handle.remove()
    loss.backward()
    assert_same(collect(model), gradients(alone, batch))
