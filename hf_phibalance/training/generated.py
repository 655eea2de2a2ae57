"""Counts the tokens of steps that train on generated text: in trl's GRPO and RLOO, after the first micro-batch is prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..balancing import PhiBalancer


logger = logging.get_logger(__name__)

GENERATING = {"GRPOTrainer", "RLOOTrainer"}


def generates(trainer: Any) -> bool:
    """Whether `trainer` draws batches of prompts, and generates the text to train on when it prepares them."""
    names = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")}
    return bool(names & GENERATING) and hasattr(trainer, "_buffered_inputs")


def announce_when_generated(
    trainer: Any, current: Callable[[], PhiBalancer | None], inner: Callable, *args: Any, **kwargs: Any
) -> Any:
    """
    Calls `inner`, the trainer's `_prepare_inputs`, then announces the tokens of the optimizer step at its first micro-batch: by
    then the whole step has been generated, and the model has not seen it. Until then the step is announced by number.
    """
    inputs = inner(*args, **kwargs)
    balancer = current()
    if balancer is not None and balancer.is_open and balancer.now.tokens is None and not balancer.is_trained_on:
        micro_batches = generated_step(trainer) if trainer.model.training else None
        if micro_batches is not None:
            balancer.begin_step(micro_batches, by_part=True)
        elif trainer.model.training:
            logger.warning_once(
                "Not all that an optimizer step trains on has been generated when it begins, so each micro-batch gets its own "
                "mean instead of its exact share of the step's tokens. In trl's GRPOTrainer and RLOOTrainer it has, if "
                "steps_per_generation is a multiple of gradient_accumulation_steps (the default)."
            )
    return inputs


def generated_step(trainer: Any) -> list[dict[str, Tensor]] | None:
    """Returns the micro-batches of the step as the model will get them; `None` if some are not generated yet."""
    try:  # private attributes of trl, the same on all ranks
        first, count = trainer._step, trainer.current_gradient_accumulation_steps
        buffered, per_generation = trainer._buffered_inputs, trainer.args.steps_per_generation
        every = per_generation * trainer.num_iterations
        if len(buffered) != per_generation or first % every + count > every:
            return None  # some are generated in the middle of the step
        return [_model_inputs(buffered[(first + number) % per_generation]) for number in range(count)]
    except (AttributeError, KeyError, TypeError):
        return None


def _model_inputs(micro_batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenates prompts and completions as trl does. Only completions have labels."""
    prompt_ids, completion_ids = micro_batch["prompt_ids"], micro_batch["completion_ids"]
    prompt_mask, completion_mask = micro_batch["prompt_mask"], micro_batch["completion_mask"]
    labels = completion_ids.masked_fill(completion_mask == 0, -100)
    return {
        "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
        "attention_mask": torch.cat([prompt_mask, completion_mask], dim=1),
        "labels": torch.cat([torch.full_like(prompt_ids, -100), labels], dim=1),
    }
