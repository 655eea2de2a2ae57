"""Counts of experts that tokens choose at random."""

import torch


def draw(logits_E, top_k, tokens, generator):
    """Returns the counts `(E,)` of `tokens` independent tokens that each choose `top_k` distinct experts."""
    noise = -torch.rand(tokens, len(logits_E), generator=generator, dtype=torch.float64).log().log1p().neg()
    gumbel = -(-torch.rand(noise.shape, generator=generator, dtype=torch.float64).log()).log()
    return torch.bincount((logits_E + gumbel).topk(top_k, -1).indices.flatten(), minlength=len(logits_E))
