"""How a run is to die."""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

import hf_phibalance as phb

from .training import ACCUMULATION, EVERY, STEPS


MOMENTS = ("forward", "backward", "update", "checkpoint", "state", "any", "disk")
MODULES = ("self_attn", "mlp", "mlp.gate", "mlp.experts", "input_layernorm", "post_attention_layernorm")


@dataclass
class Trap:
    """
    How a run is to die.

    Args:
        moment (`str`): one of `MOMENTS`.
        seed (`int`): what is left open (the step, the module, ...) is drawn by it.
        told (`int`), tell (`int`): ends of the pipe by which a parent who kills learns that its delay begins.
        file_limit (`int`, *optional*): bytes that no file may exceed.
    """

    moment: str
    seed: int
    told: int
    tell: int
    file_limit: int | None = None

    @property
    def by_parent(self) -> bool:
        return self.moment in ("checkpoint", "state", "any")

    def set(self, trainer: Trainer, done: int) -> None:
        """Arms `trainer`, which resumes after `done` steps."""
        rng, left = random.Random(self.seed), STEPS - done
        model: Any = trainer.model
        if self.moment == "forward":
            layer = rng.choice(model.model.layers)
            after = countdown(rng.randint(1, left * ACCUMULATION))
            layer.get_submodule(rng.choice(MODULES)).register_forward_hook(lambda *_: after())
        elif self.moment == "backward":
            after = countdown(rng.randint(1, left * ACCUMULATION))
            rng.choice(list(model.parameters())).register_hook(lambda _: after())
        elif self.moment == "update":
            after = countdown(rng.randint(1, left))
            trainer.create_optimizer().register_step_post_hook(lambda *_: after())
        elif self.moment == "checkpoint":
            self._tell_before(trainer, "_save_checkpoint", rng.randint(1, left // EVERY))
        elif self.moment == "state":
            self._tell_before(phb.get_balancer(model), "save", rng.randint(1, left // EVERY))
        elif self.file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, resource.RLIM_INFINITY))

    def _tell_before(self, owner: Any, name: str, call: int) -> None:
        method, after = getattr(owner, name), countdown(call, lambda: os.write(self.tell, b"."))

        def told(*args, **kwargs):
            after()
            return method(*args, **kwargs)

        setattr(owner, name, told)


def countdown(calls: int, action: Callable[[], Any] = lambda: os.kill(os.getpid(), signal.SIGKILL)) -> Callable:
    """A function that does nothing but at one of its calls."""
    left = iter(range(calls - 1, -1, -1))

    def count() -> None:
        if next(left, None) == 0:
            action()

    return count
