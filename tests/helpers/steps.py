"""Optimizer steps of several micro-batches: the gradient of a patched model, and the gradient of a formula."""

import torch
from charging import collect
from checks import is_patched
from references import forward
from tiny import ROUTER, tiny_batch, tiny_model

import hf_phibalance as phb


METHODS = ("phi", "switch", "pooled", "global_batch", "loss_free", "quantile", "frozen", "none")
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
CHECKPOINTING = {"none": None, "non_reentrant": False, "reentrant": True}
SHAPES = ((2, 8), (3, 6), (2, 10))  # rows and width of the micro-batches of a step; later rows are shorter
EXTRA_COEF = {"z_loss_coef": 0.1, "sequence_coef": 2.0}
UNGROUPED = {"n_group": 1, "topk_group": 1}  # DeepSeek-V3 first drops half of its groups


def micro_batches(model, shapes=SHAPES, seed=0):
    return [tiny_batch(model, *shape, seed=seed + i) for i, shape in enumerate(shapes)]


def dealt(batch, sizes):
    """Returns `batch` split by rows into micro-batches of `sizes` rows, all of its width."""
    start = 0
    for size in sizes:
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}
        start += size


def many_tokens(model, seed=0):
    """Returns one padded micro-batch. Its number of tokens makes the fair share (8 experts, top-2) a whole number."""
    batch = tiny_batch(model, 16, 64, seed=seed)
    while batch["attention_mask"].sum() % 4:
        row = int(batch["attention_mask"].sum(1).argmax())
        last = int(batch["attention_mask"][row].sum()) - 1
        batch["attention_mask"][row, last] = 0
        batch["labels"][row, last] = -100
    return batch


def build(model_type, checkpointing="none", **overrides):
    model = tiny_model(model_type, **overrides).train()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    return model


def build_for(config, model_type, **overrides):
    """Like `build`. Removes groups for quantile balancing, which refuses them."""
    grouped = model_type == "deepseek_v3" and config.get("method") == "quantile"
    return build(model_type, **(UNGROUPED if grouped else {}), **overrides)


def router_parameters(model):
    return {name: p for name, p in model.named_parameters() if ROUTER.search(name)}


def step_gradient(model, batches, announce=None, close=True):
    """Returns the gradient of an optimizer step, including what a patch adds."""
    model.zero_grad()
    balancer = phb.get_balancer(model) if is_patched(model) else None
    if balancer is not None:
        balancer.begin_step(batches if announce is None else announce)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    if balancer is not None and close:
        balancer.step()
    return collect(model)


def loss_gradient(model, batches, losses, shares=None, token_mask="attention_mask"):
    """Gradient of Σ_j share_j Σ coef · loss(micro-batches 1..j) on an unpatched model. `losses`: `[(coef, loss)]`."""
    assert not is_patched(model)
    model.zero_grad()
    routed = [forward(model, batch, token_mask)[1] for batch in batches]
    tokens = [int(next(iter(r.values())).mask.sum()) for r in routed]
    shares = [count / sum(tokens) for count in tokens] if shares is None else shares
    total = 0.0
    for j, part in enumerate(shares):
        for coef, loss in losses:
            total = total + part * coef * loss(routed[: j + 1])
    total.backward()
    return collect(model)


def difference(left, right):
    return {name: left[name] - right[name] if name in right else left[name] for name in left}


def assert_gradient(actual, expected, tolerance=1e-4, parts=(True, False)):
    """Asserts float32 accuracy by the relative residual: of the routers (True), of everything below them (False)."""
    for part in parts:
        names = [name for name in expected if bool(ROUTER.search(name)) is part]
        assert names
        zeros = {name: torch.zeros_like(expected[name]) for name in names}
        left, right = (
            torch.cat([{**zeros, **grads}[name].double().flatten() for name in names]) for grads in (actual, expected)
        )
        assert right.norm() > 1e-2
        assert (left - right).norm() <= tolerance * right.norm(), (part, left.norm(), right.norm())
    beyond = actual.keys() - expected.keys()
    assert all(actual[name].abs().max() < 1e-4 for name in beyond), beyond


def added_gradient(model, config, batches, prepare=None, announce=None):
    """Returns what the patch adds to the task gradient. Leaves `model` patched."""
    plain = step_gradient(model, batches)
    phb.patch(model, config)
    if prepare is not None:
        prepare(model)
    return difference(step_gradient(model, batches, announce), plain)
