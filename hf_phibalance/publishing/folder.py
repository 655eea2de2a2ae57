"""The folder that is uploaded: weights, config, duals, tokenizer, card, and of a run its pictures and figures."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoConfig

from ..balancing import get_balancer
from ..reporting import versions
from ..routers import unwrap
from ..sidecar import STATE_NAME
from .card import CARD_NAME, model_card
from .evaluations import EVAL_RESULTS_FOLDER, eval_result_files
from .licence import base_licence
from .pictures import pictures_in
from .run import SUMMARY_NAME, Run, described


def write_folder(
    folder: Path,
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    run_folder: str | os.PathLike | None = None,
    card: ModelCard | None = None,
    online: bool = False,
    token: bool | str | None = None,
) -> None:
    """Writes what is uploaded; with `online`, a licence that is not at hand is looked up on the Hub."""
    run, baseline = load_run(model, run_folder)
    saved: Any = next(part for part in unwrap(model) if hasattr(type(part), "save_pretrained"))
    adapter = _adapter_config(saved)
    if card is None:
        base_model = _base_model(saved, run)
        card = model_card(
            run,
            baseline,
            title=repo_id.split("/")[-1],
            base_model=base_model,
            licence=base_licence(base_model, online, token) if base_model else None,
            library_name="transformers" if adapter is None else "peft",
            repo_id=repo_id,
            pictures=pictures_in(run_folder) if run_folder else (),
        )
    folder.mkdir(parents=True, exist_ok=True)
    # PEFT would ask the Hub whether the vocabulary has grown
    saved.save_pretrained(folder, **({} if adapter is None else {"save_embedding_layers": _embeddings_changed(saved)}))
    _sort_metadata(folder / STATE_NAME)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if run_folder is not None:
        for name in (SUMMARY_NAME, *pictures_in(run_folder)):
            shutil.copyfile(Path(run_folder) / name, folder / name)
        for name, text in eval_result_files(run).items():
            (folder / EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
            (folder / EVAL_RESULTS_FOLDER / name).write_text(text)
    card.save(folder / CARD_NAME)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, whose order is random, so that the same state is the same file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(content[:8] + text.ljust(size) + content[8 + size :])


def load_run(model: nn.Module, run_folder: str | os.PathLike | None) -> tuple[Run, Run | None]:
    """The run and its baseline; what is known of `model` without a folder of either."""
    if run_folder is not None:
        return Run.load(run_folder), Run.load_baseline(run_folder)
    balancer = get_balancer(model)
    root: Any = balancer.root
    summary = {
        **described(root),
        "parameters": sum(parameter.numel() for parameter in root.parameters()),
        "steps": balancer.steps,
        "balance": balancer.config.to_dict() if balancer.config.is_on else None,
        "versions": versions(),
    }
    return Run(summary, [], []), None


def _adapter_config(model: Any) -> Any:
    """The PEFT config of an adapter, or `None`."""
    configs = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    return configs[model.active_adapter] if configs else None


def _base_model(model: Any, run: Run) -> str | None:
    """What was fine-tuned, as a name on the Hub or a local folder; `None` for a model trained from scratch."""
    adapter = _adapter_config(model)
    if adapter is not None and adapter.base_model_name_or_path:
        return adapter.base_model_name_or_path
    if "base_model" in run.summary:
        return run.summary["base_model"]
    return getattr(model.config, "_name_or_path", None) or None


def _embeddings_changed(model: Any) -> bool:
    """Whether an adapter has to carry the embeddings: they are trained, or have other rows than the base model's."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    adapter, base = _adapter_config(model), model.get_base_model()
    targets = getattr(adapter, "target_modules", None) or ()
    if isinstance(targets, str):
        names = [name for name, _ in base.named_modules() if re.fullmatch(targets, name)]
    else:
        names = list(targets)
    if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names):
        return getattr(adapter, "trainable_token_indices", None) is None
    try:
        original = AutoConfig.from_pretrained(adapter.base_model_name_or_path, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return False
    return original.get_text_config().vocab_size != base.config.get_text_config().vocab_size
