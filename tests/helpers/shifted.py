"""Mixtral routers whose logits are shifted: an expert that takes all tokens, one that is masked, numbers that are none."""

import contextlib

import torch
import torch.nn.functional as F
from references import routers


@contextlib.contextmanager
def shifted(model, expert, by):
    """While open, the logits of `expert` have `by` added in every router; the rest of its forward, written out."""
    for router in routers(model).values():

        def forward(hidden_states, router=router):
            offset = torch.zeros(router.num_experts).index_fill(0, torch.tensor(expert), by)
            logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight) + offset
            values, chosen = torch.topk(logits.softmax(-1), router.top_k, dim=-1)
            return logits, values / values.sum(-1, keepdim=True), chosen

        router.forward = forward
    yield
    for router in routers(model).values():
        del router.forward
