"""Counts of experts that tokens choose by chance."""

import torch


def draw(logits_E, top_k, tokens, generator):
    """Counts of `tokens` independent tokens that each take `top_k` distinct experts, `(E,)`."""
    noise = -torch.rand(tokens, len(logits_E), generator=generator, dtype=torch.float64).log().log1p().neg()
    gumbel = -(-torch.rand(noise.shape, generator=generator, dtype=torch.float64).log()).log()
    return torch.bincount((logits_E + gumbel).topk(top_k, -1).indices.flatten(), minlength=len(logits_E))
