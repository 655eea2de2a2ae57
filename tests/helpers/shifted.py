"""Mixtral routers with shifted logits: an expert that takes all tokens, a masked expert, non-finite numbers."""

import contextlib

import torch
import torch.nn.functional as F
from references import routers


@contextlib.contextmanager
def shifted(model, expert, by):
    """Context manager: adds `by` to the logits of `expert` in every router. The rest of the forward is unchanged."""
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
