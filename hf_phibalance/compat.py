"""Shims around faults of other libraries, and around what older versions lack. Each says when it can go."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
    """What the installed package asks for of `DEPENDED_ON`, and the version that is there; empty in a bare source tree."""
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires("hf_phibalance") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    own = [requirement for requirement in asked if requirement.name in DEPENDED_ON and requirement.marker is None]
    return [(requirement, importlib.metadata.version(requirement.name)) for requirement in own]


def is_supported(requirement: Requirement, present: str) -> bool:
    return requirement.specifier.contains(present, prereleases=True)


def refuse_unsupported_versions() -> None:
    """
    Says at import which version is outside the range that the installed package asks for, instead of failing inside.

    Raises:
        ImportError: naming the version, the range and the remedy.
    """
    for requirement, present in dependencies():
        if not is_supported(requirement, present):
            raise ImportError(
                f"hf_phibalance does not support {requirement.name} {present}: it works with {requirement.specifier}. "
                f"pip install '{requirement}'"
            )


refuse_unsupported_versions()


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """
    `model` without the parallel and compiled wrappers around it. accelerate before 1.13 fails at a
    `DistributedDataParallel` around a compiled model; the `except` can go when that is the oldest supported.
    """
    try:
        return extract_model_from_parallel(model, keep_torch_compile=False)
    except KeyError:
        return model.get_submodule("module")


def names_rewritten_by_peft(root: nn.Module, names: set[str]) -> set[str]:
    """
    Those of `names` of modules that PEFT turns into the fused expert parameters of the family of `root`. Before 0.19 it
    rewrites nothing; the `except` can go when that is the oldest supported.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    probe = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(probe, root, None)
    return names - set(probe.target_modules or ())


def has_decoder_of_deepseek_moe() -> bool:
    """
    Whether transformers has the decoder that [`models.deepseek_moe`] is made of, which came between 5.10 and 5.12. Can go
    when that is the oldest supported; until then an older one says that it does not know the model type.
    """
    return importlib.util.find_spec("transformers.models.deepseek_ocr2") is not None


def reload_converted_weights(root: nn.Module, checkpoint: Path) -> None:
    """
    Loads the weights that `Trainer` leaves out when it reads `checkpoint` into `root`, on resume or as the best model.

    Checkpoints are written in the layout of the Hub (an expert a tensor, old names), but `Trainer` reads them without
    converting that back: it warns about missing keys, and experts (Mixtral: routers too) keep the weights they had.
    Can go with a transformers that has https://github.com/huggingface/transformers/pull/48822. Without effect on
    checkpoints that need no conversion: adapters, FSDP's and DeepSpeed's own.
    """
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    written = _written_keys(checkpoint)
    if not written or not isinstance(root, PreTrainedModel) or AcceleratorState().distributed_type in sharded:
        return
    ours = {
        key for key in root.state_dict() if "phi_balance." in key
    }  # the selection bias, which the state file holds
    missing = sorted(set(root.state_dict()) - written - set(root.all_tied_weights_keys) - ours)
    if not missing:
        return
    mixed = len({p.dtype for p in root.parameters()}) > 1  # routers in float32: "auto" would round them
    with torch.random.fork_rng(devices=[]):
        complete: Any = type(root).from_pretrained(checkpoint, dtype=torch.float32 if mixed else "auto")
    root.load_state_dict(complete.state_dict() | {key: root.state_dict()[key] for key in ours})
    logger.warning(f"{len(missing)} weights that Trainer found missing ({missing[0]!r}, ...) were loaded after all.")


def _written_keys(checkpoint: Path) -> set[str]:
    """Returns the names of the weights in `checkpoint`; empty if it has none in safetensors."""
    index, weights = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not weights.is_file():
        return set()
    with safe_open(weights, framework="pt") as file:
        return set(file.keys())


def stop_if_done(trainer: Trainer) -> bool:
    """
    Whether training is over before it begins, since it resumed from its last step; then it is told to stop.

    `Trainer` asks only after a step, so a run that died after its last checkpoint, in an evaluation say, is trained a step
    too far by every restart. Can go with a transformers that ends `train(resume_from_checkpoint=True)` at `max_steps`.
    """
    is_done = trainer.state.global_step >= trainer.state.max_steps
    trainer.control.should_training_stop |= is_done
    return is_done
