"""Patched tiny models after some optimizer steps, and their duals."""

import torch
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


GRADIENT = {"coef": 0.5}
BIAS = {"coef": 0.5, "bias_coef": 0.2}
NATIVE = ["deepseek_v3", "minimax_m2", "ernie4_5_moe"]
RESELECTING = ["mixtral", "gpt_oss", "deepseek_v2"]


def trained(model_type, config, steps=2, **overrides):
    """Returns a patched model after some optimizer steps, in eval mode."""
    model = phb.patch(tiny_model(model_type, **overrides).train(), config)
    balancer = phb.get_balancer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(steps):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def duals(model):
    """Returns everything that a balancer carries from step to step, `{kind/layer: tensor}`."""
    balancer = phb.get_balancer(model)
    tensors = {"steps": torch.tensor(balancer.steps)}
    for kind, by_layer in (
        ("probs", balancer.means("probs")),
        ("load", balancer.means("load")),
        ("price", balancer.prices()),
        ("bias", balancer.biases()),
    ):
        tensors |= {f"{kind}/{name}": value for name, value in by_layer.items()}
    return tensors
