"""
LLaMA-Factory has no plugins: run `python -m hf_phibalance.integrations.llamafactory train config.yaml` instead of
`llamafactory-cli train config.yaml`.

The config gets one more key, `phi_balance: {coef: 0.01}`, or `false` for no balancing. `watch: true` watches the routers ([`watch`]),
also without `phi_balance`. Everything else works as before: other keys, overrides on the command line, and several GPUs (`FORCE_TORCHRUN`, `NPROC_PER_NODE`, ...).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from transformers import Trainer

from ..balancing import patch
from ..config import PhiBalanceConfig
from ..training import attach, watch


KEY, WATCH = "phi_balance", "watch"
COMMAND = "-m hf_phibalance.integrations.llamafactory train"
OTHER_LOOPS = ("use_ray", "use_mca", "use_hyper_parallel")  # train in other processes, or without `Trainer`


def main() -> None:
    """The command."""
    if sys.argv[1:2] != ["train"] or os.environ.get("USE_V1", "").lower() in ("true", "1"):
        raise SystemExit(f"usage: python {COMMAND} config.yaml (USE_V1 unset); for all else use llamafactory-cli")
    from llamafactory import launcher
    from llamafactory.train import tuner

    tuner.run_exp = functools.partial(run, tuner.run_exp)
    if "LOCAL_RANK" in os.environ:  # one of the processes that torchrun has started
        del sys.argv[1]
        tuner.run_exp()
    else:
        launcher.__file__ = COMMAND  # torchrun starts this command in each process
        launcher.launch()


def run(run_exp: Any) -> None:
    """Calls `run_exp` of LLaMA-Factory with the config of the command line, balanced by its `phi_balance` and watched by its `watch`."""
    from llamafactory.hparams import read_args

    options = read_args()
    if not isinstance(options, dict) or not {KEY, WATCH} & options.keys():
        raise ValueError(
            f"`{KEY}` is missing: write `{KEY}: {{coef: 0.01}}` into the YAML or JSON config, or `{WATCH}: true` to watch only."
        )
    is_watched, config = options.pop(WATCH, False), PhiBalanceConfig.from_any(options.pop(KEY, False))
    key = WATCH if config is None else KEY
    if config is None and is_watched:
        config = PhiBalanceConfig(method="none")
    if config is None:
        return run_exp(options)
    refuse_impossible(options, config, key)
    with balanced_trainers(config, is_watched):
        run_exp(options)


def refuse_impossible(options: dict[str, Any], config: PhiBalanceConfig, key: str) -> None:
    """Raises if `options` of LLaMA-Factory would make the coefficient or the counts inexact. `key` asked for them."""
    if config.is_on and options.get("moe_aux_loss_coef"):
        raise ValueError(
            f"moe_aux_loss_coef: {options['moe_aux_loss_coef']} adds a second auxiliary loss to {KEY}. Remove one of them."
        )
    if options.get("stage") == "ppo":
        raise ValueError(f"stage: ppo has a training loop of its own, which {key} does not reach. Remove {key}.")
    for name in OTHER_LOOPS:
        if options.get(name):
            raise ValueError(
                f"{name}: true does not train with transformers' Trainer in this process. Remove {name} or {key}."
            )
    padded = options.get("packing") and not options.get("neat_packing") and options.get("stage", "sft") == "sft"
    if padded and config.token_mask == "attention":
        method = "method: none, " if key == WATCH else ""
        raise ValueError(
            "packing: true without neat_packing fills every pack with padding that the attention mask does not tell from "
            f"tokens, so that it would count. Set neat_packing: true, or {KEY}: {{{method}token_mask: labels}}."
        )


@contextlib.contextmanager
def balanced_trainers(config: PhiBalanceConfig, is_watched: bool) -> Iterator[None]:
    """Context manager: inside it every `Trainer` trains φ-balanced, and is watched if `is_watched`."""
    cls: Any = Trainer
    inner = cls.train

    @functools.wraps(inner)
    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        patch(trainer.model, config)
        attach(trainer)
        if is_watched:
            watch(trainer)
        return inner(trainer, *args, **kwargs)

    cls.train = train
    try:
        yield
    finally:
        cls.train = inner


if __name__ == "__main__":
    main()
