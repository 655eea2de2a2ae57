"""Workarounds for bugs and missing features of other libraries. Each says when it can be removed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from packaging.requirements import Requirement
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging


logger = logging.get_logger(__name__)
DEPENDED_ON = ("torch", "transformers", "accelerate")


def dependencies() -> list[tuple[Requirement, str]]:
    """Returns (requirement, installed version) of each of `DEPENDED_ON`, or `[]` if this package is not installed."""
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires("hf_phibalance") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    own = [requirement for requirement in asked if requirement.name in DEPENDED_ON and requirement.marker is None]
    return [(requirement, importlib.metadata.version(requirement.name)) for requirement in own]


def refuse_unsupported_versions() -> None:
    """Raises `ImportError` early if an installed version is outside the supported range."""
    for requirement, present in dependencies():
        if not requirement.specifier.contains(present, prereleases=True):
            raise ImportError(
                f"hf_phibalance does not support {requirement.name} {present}: it works with {requirement.specifier}. "
                f"pip install '{requirement}'"
            )


refuse_unsupported_versions()


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """
    Returns `model` without its parallel and compile wrappers. accelerate before 1.13 fails for
    `DistributedDataParallel` around a compiled model. Remove the `except` when 1.13 is the oldest supported version.
    """
    try:
        return extract_model_from_parallel(model, keep_torch_compile=False)
    except KeyError:
        return model.get_submodule("module")


def names_rewritten_by_peft(root: nn.Module, names: set[str]) -> set[str]:
    """
    Returns the module names in `names` that PEFT maps to fused expert parameters of `root`. PEFT before 0.19 maps
    none. Remove the `except` when 0.19 is the oldest supported version.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    probe = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(probe, root, None)
    return names - set(probe.target_modules or ())


def reload_converted_weights(root: nn.Module, checkpoint: Path) -> None:
    """
    Loads the weights of `checkpoint` that `Trainer` misses, on resume or for the best model.

    Checkpoints have the layout of the Hub (one tensor per expert, old names). `Trainer` loads them without conversion:
    it warns about missing keys, and experts (in Mixtral also routers) keep their old weights. Checkpoints that need no
    conversion (adapters, FSDP, DeepSpeed) are not affected. Remove this when transformers has
    https://github.com/huggingface/transformers/pull/48822.

    Raises:
        ValueError: If the weight index is damaged.
    """
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    written = _written_keys(checkpoint)
    if not written or not isinstance(root, PreTrainedModel) or AcceleratorState().distributed_type in sharded:
        return
    ours = {key for key in root.state_dict() if "phi_balance." in key}  # the selection bias: in the state file
    missing = sorted(set(root.state_dict()) - written - set(root.all_tied_weights_keys) - ours)
    if not missing:
        return
    mixed = len({p.dtype for p in root.parameters()}) > 1  # "auto" would round routers in float32
    with torch.random.fork_rng(devices=[]):
        complete: Any = type(root).from_pretrained(checkpoint, dtype=torch.float32 if mixed else "auto")
    root.load_state_dict(complete.state_dict() | {key: root.state_dict()[key] for key in ours})
    logger.warning(f"{len(missing)} weights that Trainer found missing ({missing[0]!r}, ...) were loaded after all.")


def _written_keys(checkpoint: Path) -> set[str]:
    """Returns the weight names in `checkpoint`; empty if it has no safetensors files."""
    index, weights = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        try:
            return set(dict(json.loads(index.read_text())["weight_map"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{index} is damaged ({error!r}). Write the checkpoint again, or resume from an earlier one."
            ) from error
    if not weights.is_file():
        return set()
    with safe_open(weights, framework="pt") as file:
        return set(file.keys())


def stop_if_done(trainer: Trainer) -> bool:
    """
    Stops `trainer` if it resumed at `max_steps`, and returns whether it did.

    `Trainer` checks only after a step. A run that died after its last checkpoint, for example in an evaluation, would
    train one more step at every restart. Remove this when `train(resume_from_checkpoint=True)` ends at `max_steps`.
    """
    is_done = trainer.state.global_step >= trainer.state.max_steps
    trainer.control.should_training_stop |= is_done
    return is_done
