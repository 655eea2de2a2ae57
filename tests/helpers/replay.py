"""Routers that replay the experts recorded in a rollout, with those experts' weights."""

import contextlib

import torch
import torch.nn.functional as F
from references import routers


def weigh(router, logits, chosen):
    """Returns the weights of the experts `chosen (T, k)`, for the families tested here."""
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek-V3
        values = logits.sigmoid().gather(-1, chosen)
        return values / (values.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor
    values = logits.softmax(-1).gather(-1, chosen)  # Mixtral
    return values / values.sum(-1, keepdim=True)


@contextlib.contextmanager
def replayed(model, choices):
    """Context manager: router `name` returns `choices[name] (T, k)`, whatever its logits and biases."""

    def forward_of(router, chosen):
        def forward(hidden):
            logits = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float())
            return logits, weigh(router, logits, chosen), chosen

        return forward

    for name, router in routers(model).items():
        router.forward = forward_of(router, choices[name])
    try:
        yield
    finally:
        for router in routers(model).values():
            del router.forward


class Rollouts:
    """Records the routers' choices while `model` generates, row by row, and returns them for the same rows."""

    def __init__(self, model):
        self.rows = {}  # tokens of a row: {router name: (S - 1, k)}; the last token has no choice
        self._calls = None
        for name, router in routers(model).items():
            router.register_forward_hook(lambda _, args, out, name=name: self._note(name, out[2]))
        self._generate, model.generate = model.generate, self.generate

    def _note(self, name, chosen):
        if self._calls is not None:
            self._calls.setdefault(name, []).append(chosen)

    def generate(self, input_ids, **options):
        self._calls = {}
        ids = self._generate(input_ids=input_ids, **options)
        calls, self._calls = self._calls, None
        by_row = {
            name: torch.cat([chosen.view(len(ids), -1, chosen.shape[-1]) for chosen in found], dim=1)
            for name, found in calls.items()
        }
        for i, row in enumerate(ids.tolist()):
            self.rows[tuple(row)] = {name: chosen[i] for name, chosen in by_row.items()}
        return ids

    def of(self, input_ids):
        """Returns `{router name: (B·S, k)}` of generated rows. The last token of each repeats the one before it."""
        found = [self.rows[tuple(row)] for row in input_ids.tolist()]
        return {name: torch.cat([torch.cat([row[name], row[name][-1:]]) for row in found]) for name in found[0]}
