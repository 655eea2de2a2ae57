"""What a step must not cost: reads of the device, more than one all-reduce of statistics, many kernels, and memory."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from operators import Operators
from tiny import tiny_batch, tiny_model
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import make_trainer, patched

import hf_phibalance as phb
from hf_phibalance.balancing import forwards


pytestmark = pytest.mark.slow


# What makes the host wait for the device: methods that Python sees, and operators that the dispatcher sees.
READING_METHODS = ["item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"]
READING_OPERATORS = ["_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"]

CONFIGS = {
    "gradient": {},
    "current": {"price_from": "current"},
    "labels": {"token_mask": "labels"},
    "bias": {"bias_coef": 0.1, "bias_track": "load"},
}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """What is counted runs outside of dispatch modes; here it is to be seen."""
    monkeypatch.setattr(forwards, "unrecorded", torch.no_grad)


@contextlib.contextmanager
def counted_reads(monkeypatch):
    """How often each reading method and operator was used inside."""
    reads = Counter()
    with monkeypatch.context() as patch, Operators() as operators:
        for name in READING_METHODS:
            original = getattr(torch.Tensor, name)

            def method(self, *args, name=name, original=original, **kwargs):
                reads[name] += 1
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, method)
        yield reads
    reads.update({name: operators.seen[name, "aten"] for name in READING_OPERATORS if operators.seen[name, "aten"]})


def step(model, batches, balancer=None, announced=True):
    model.zero_grad()
    if balancer is not None and announced:
        balancer.begin_step(batches)
    for batch in batches:
        model(**batch).loss.backward()
    if balancer is not None:
        balancer.step()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_a_step_reads_nothing_off_the_device(model_type, case, checkpointing, monkeypatch):
    """
    From the second step on: not once more than the unpatched model does in its forward and backward, but for the number of bad
    steps, which a copy has brought to the host during the step before.
    """
    model = tiny_model(model_type).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    batches = [tiny_batch(model, seed=seed) for seed in range(2)]
    step(model, batches)
    with counted_reads(monkeypatch) as unpatched:
        step(model, batches)
    phb.patch(model, CONFIGS[case])
    balancer = phb.get_balancer(model)
    with counted_reads(monkeypatch) as first:
        step(model, batches, balancer)
    assert first != unpatched  # the start-up checks do read
    with counted_reads(monkeypatch) as second:
        step(model, batches, balancer)
    assert second - unpatched == {"tolist": 1}
    assert balancer.steps == 2 and any(price.abs().max() > 1e-3 for price in balancer.prices().values())


def test_a_watched_step_reads_nothing_off_the_device(monkeypatch):
    model, batches = tiny_model("mixtral").train(), [tiny_batch(tiny_model("mixtral"))]
    step(model, batches)
    with counted_reads(monkeypatch) as unwatched:
        step(model, batches)
    balancer = phb.watch(model).balancer
    for _ in range(2):
        step(model, batches, balancer)
    with counted_reads(monkeypatch) as watched:
        step(model, batches, balancer)
    assert watched - unwatched == {"tolist": 1}


def test_metrics_read_the_device_only_when_logging(monkeypatch, tmp_path):
    """A trainer that logs at every third step reads there what the callback logs, and nothing in between."""
    reads = {}
    for logging_steps in (1, 3):
        model = patched()
        trainer = make_trainer(model, tmp_path, logging_steps=logging_steps, max_steps=6)
        phb.attach(trainer)
        balancer = phb.get_balancer(model)
        calls = reads[logging_steps] = []
        for name in ("metrics", "loads", "check_finite", "prices", "means", "biases"):
            original = getattr(balancer, name)

            def noted(*args, name=name, original=original, calls=calls, trainer=trainer):
                calls.append((trainer.state.global_step, name))
                return original(*args)

            monkeypatch.setattr(balancer, name, noted)
        trainer.train()
    assert [at for at, name in reads[3] if name == "metrics"] == [3, 6]
    assert [at for at, name in reads[1] if name == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert {at for at, _ in reads[3]} == {3, 6}


@pytest.fixture
def two_ranks():
    """A process group of two ranks, of which the other one answers nothing: collectives run, and change nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("case", CONFIGS)
def test_one_all_reduce_a_step(case, announced, two_ranks):
    """
    All statistics of all layers in one, and the number of tokens in another, of each forward where nothing was announced; nothing
    else, however many layers, but whether the ranks balance the same, once.
    """
    for layers in (2, 5):
        model = tiny_model("mixtral", num_hidden_layers=layers).train()
        phb.patch(model, CONFIGS[case])
        balancer = phb.get_balancer(model)
        batches = [tiny_batch(model, seed=seed) for seed in range(3 if announced else 1)]
        for once in ([2], []):
            sizes = []
            with pytest.MonkeyPatch.context() as patch:
                reduce = dist.all_reduce

                def sized(tensor, *args, reduce=reduce, sizes=sizes, **kwargs):
                    sizes.append(tensor.numel())
                    return reduce(tensor, *args, **kwargs)

                patch.setattr(dist, "all_reduce", sized)
                with Operators() as operators:
                    step(model, batches, balancer, announced)
            collectives = {name: count for (name, space), count in operators.seen.items() if space.startswith("c10d")}
            assert collectives == {"allreduce_": 2 + len(once)}
            assert sizes[:-1] == [1, *once]
            assert 0 < sizes[-1] - (2 * 8 + 4) * layers < 8  # probs, load, confidence; tokens, replays, what they paid


# Operators that start no kernel: what they return is a view, or no tensor.
VIEWS = {
    *("alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "promote_types", "select", "slice", "split"),
    *("squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view"),
}


def kernels(layers, config=None, built_in=False):
    """How many a step of one micro-batch takes, forward, backward and duals, on a Mixtral of so many layers."""
    model = tiny_model("mixtral", num_hidden_layers=layers, output_router_logits=built_in).train()
    balancer = None
    if config == "watched":
        balancer = phb.watch(model).balancer
    elif config is not None:
        phb.patch(model, config)
        balancer = phb.get_balancer(model)
    batch = tiny_batch(model)
    for _ in range(3):
        step(model, [batch], balancer)
    with Operators() as operators:
        step(model, [batch], balancer)
    return sum(count for (name, _), count in operators.seen.items() if name not in VIEWS)


def added_by_a_router(config=None, built_in=False):
    few, many = (kernels(layers, config, built_in) - kernels(layers) for layers in (2, 4))
    return (many - few) / 2


@pytest.mark.parametrize(
    ("config", "most"),
    [("watched", 3), ({}, 4), ({"coef": 0.0, "bias_coef": 0.003}, 6), ({"bias_coef": 0.003}, 7)],
    ids=["watched", "price", "bias", "both"],
)
def test_kernels_that_a_router_adds(config, most):
    """A number that depends on no machine: much less than the loss of transformers takes."""
    assert added_by_a_router(config) <= most <= added_by_a_router(built_in=True) / 2


@pytest.mark.parametrize(("model_type", "more"), [("mixtral", 0), ("qwen3_moe", 0), ("deepseek_v3", 2)])
def test_what_is_kept_for_the_backward(model_type, more):
    """Nothing where the router has a softmax of its own; else its logits, once more."""
    kept = []
    for config in (None, {"coef": 0.1}):
        model = tiny_model(model_type).train()
        if config is not None:
            phb.patch(model, config)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=tensors: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            model(**tiny_batch(model))
        kept.append(len(tensors))
    assert kept[1] - kept[0] == more


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CONFIGS)
def test_no_synchronisation_on_a_gpu(case):
    """`begin_step` and `step` by the word of CUDA; and an evaluation may come before the first step."""
    model = tiny_model("mixtral").train()
    phb.patch(model, CONFIGS[case])
    balancer = phb.get_balancer(model)
    model.cuda()
    batches = [tiny_batch(model, seed=seed) for seed in range(2)]
    with balancer.evaluation(), torch.no_grad():
        model.eval()(**batches[0])
        assert balancer.eval_metrics()["tokens"] == batches[0]["attention_mask"].sum()
    model.train()
    step(model, batches, balancer)
    balancer.begin_step(batches)
    for batch in batches:
        model(**batch).loss.backward()  # may synchronise on its own account
    torch.cuda.set_sync_debug_mode("error")
    try:
        balancer.step()
        balancer.begin_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
