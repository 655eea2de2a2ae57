"""Checks that several tests share: equal tensors, and whether a model is patched."""

import copy
import io

import torch

import hf_phibalance as phb


def assert_same(left, right):
    """Asserts that two (nested) dicts of tensors are equal bit for bit."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[key])
        else:
            assert torch.equal(value, right[key]), key


def is_patched(model):
    try:
        phb.get_balancer(model)
    except ValueError:
        return False
    return True


def ours(model):
    """Returns our hooks on all modules of `model`."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if type(hook).__module__.startswith("hf_phibalance")]


def assert_same_duals(left, right):
    left, right = phb.get_balancer(left).state_dict(), phb.get_balancer(right).state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rebuilt(model, how):
    """Returns a copy of `model`, by `"deepcopy"` or `"pickle"`."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
