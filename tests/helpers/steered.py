"""Models whose selection bias changes the choices."""

import torch
from tiny import tiny_model

import hf_phibalance as phb


def with_bias(model_type, width=0.05, **overrides):
    """Returns a patched tiny model whose selection bias changes the choices."""
    model = phb.patch(tiny_model(model_type, **overrides), {"bias_coef": 0.003})
    balancer = phb.get_balancer(model)
    generator = torch.Generator().manual_seed(1)
    balancer.set_biases(
        {name: width * torch.randn(bias.shape, generator=generator) for name, bias in balancer.biases().items()}
    )
    return model
