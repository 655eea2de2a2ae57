"""The folder of an export: an ordinary checkpoint, looked at by a process that does not have this package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..balancing import evaluating
from ..files import LARGE, find_file, read_json
from ..models import auto_class_name
from .report import ExportReport


logger = logging.get_logger(__name__)
REPORT_NAME = "export.json"
CARD_NAME = "README.md"
# Of a processor, beside what its tokenizer writes.
BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
ALLOWED = {
    torch.float32: 1e-4,
    torch.float64: 1e-4,
}  # of the largest logit, between two processes; else in half precision
ALLOWED_IN_HALF = 2e-2
# Fields of a config that promise layers which predict several tokens ahead.
PROMISES = re.compile(r"(num_)?(mtp|nextn)\w*_layers")


def check_destination(destination: Path) -> None:
    """
    Raises:
        ValueError: if something is there already.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} must be a new or an empty folder: an export would mix with what is there.")


def write_plain(
    model: nn.Module,
    tokenizer: Any,
    report: ExportReport,
    destination: Path,
    example: Mapping[str, torch.Tensor],
    not_loaded: Sequence[str],
    loading: Mapping[str, Any],
    check: bool,
) -> None:
    """
    Writes the unpatched `model` to `destination`, all of it or nothing.

    Args:
        example (`Mapping[str, torch.Tensor]`): a batch, whose logits have to be the same where the result is loaded.
        not_loaded (`Sequence[str]`): tensors of the source that transformers did not expect, and left out of the model.
        loading (`Mapping`): arguments that the weights were loaded with.
        check (`bool`): whether to load the result in a process without this package.

    Raises:
        ValueError: if the result does not load, or is another model there.
    """
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        saved: Any = model
        carried = _ignored_tensors(saved, report.base or report.source, loading)
        saved.save_pretrained(partial, **({"state_dict": saved.state_dict() | carried} if carried else {}))
        _name_left_out(saved, report, {*carried, *not_loaded}, _weight_files(partial, {}).keys())
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _copy_beside(report, partial, loading)
        if check:
            report.loaded_alone = _load_alone(saved, partial, example, loading)
        (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        _write_card(report, partial)
        with suppress(FileNotFoundError):
            destination.rmdir()  # an empty one
        os.replace(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _weight_files(source: str | os.PathLike, loading: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the safetensors file of each tensor of a checkpoint, by name."""
    path = find_file(source, SAFE_WEIGHTS_NAME, loading)
    if path is not None:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME, loading)
    if index is None:
        return {}
    shards = read_json(index, "Save the model again.", LARGE)["weight_map"]
    paths = {shard: find_file(source, shard, loading) for shard in set(shards.values())}
    return {name: paths[shard] for name, shard in shards.items()}


def _ignored_tensors(model: Any, source: str, loading: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint that its class has transformers ignore: layers that predict several tokens ahead."""
    patterns = "|".join(f"(?:{pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ())
    own, found = model.state_dict().keys(), {}
    for name, path in _weight_files(source, loading).items():
        if patterns and name not in own and re.search(patterns, name):
            with safe_open(path, "pt") as file:
                found[name] = file.get_tensor(name)
    return found


def _name_left_out(model: Any, report: ExportReport, wanted: set[str], written: Collection[str]) -> None:
    """Warns of tensors that the source has and the export does not, and of layers that config.json promises and nobody has."""
    if lost := sorted(wanted.difference(written)):
        logger.warning(
            f"{len(lost)} tensor(s) of {report.base or report.source} are not in the export, because transformers does not load "
            f"them: {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}."
        )
    fields = model.config.get_text_config().to_dict()
    promised = [f"{name}={value}" for name, value in fields.items() if PROMISES.fullmatch(name) and value]
    if promised and model.can_generate() and not wanted and not any("mtp" in name for name in written):
        logger.warning(
            f"config.json promises {promised[0]} for predicting several tokens ahead, but {report.source} has no tensors of such "
            "layers: transformers leaves them out when it saves a model. Engines cannot draft with this export; copy the "
            "tensors from the model that training began with, or set the field to 0."
        )


def _copy_beside(report: ExportReport, folder: Path, loading: Mapping[str, Any]) -> None:
    for name in BESIDE:
        path = find_file(report.base or report.source, name, loading)
        if path is not None and not (folder / name).exists():
            shutil.copyfile(path, folder / name)


def _load_alone(
    model: Any, folder: Path, example: Mapping[str, torch.Tensor], loading: Mapping[str, Any]
) -> dict[str, Any]:
    """What a process without this package finds in `folder`; refuses what is not the same model."""
    with evaluating(model), torch.no_grad():
        inputs = {name: part.to(model.device) for name, part in example.items() if name != "labels"}
        logits = model(**inputs).logits
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/example.safetensors"
        tensors = {**{name: part.cpu() for name, part in inputs.items()}, "logits": logits.float().cpu()}
        save_file({name: part.contiguous() for name, part in tensors.items()}, path)
        config = model.config
        auto_class = auto_class_name(config.model_type, [cls.__name__ for cls in type(model).__mro__])
        script = Path(__file__).with_name("alone.py")
        words = [sys.executable, "-I", str(script), str(folder), auto_class, path]
        words += [loading.get("device_map") or "", str(bool(loading.get("trust_remote_code")))]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise ValueError(f"the exported checkpoint does not load without hf_phibalance: {reason}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise ValueError(
                f"loading the exported checkpoint without hf_phibalance gives {len(found[kind])} {kind.replace('_', ' ')}, e.g. "
                f"{found[kind][0]!r}: it would not be the same model."
            )
    allowed = ALLOWED.get(model.dtype, ALLOWED_IN_HALF) * max(float(logits.abs().max()), 1.0)
    if not found["logits_differ_by"] <= allowed:
        raise ValueError(
            f"loaded without hf_phibalance, the logits of the exported checkpoint differ by {found['logits_differ_by']:.3g} from "
            f"what they are here (allowed: {allowed:.3g}): it would not be the same model."
        )
    return found


def _write_card(report: ExportReport, folder: Path) -> None:
    """The card of the source with a section more, or one that holds nothing else."""
    source = Path(report.source) / CARD_NAME
    head = source.read_text(encoding="utf-8").rstrip() + "\n\n" if source.is_file() else ""
    if not head:
        name = Path(report.source).name
        head = f"---\nlibrary_name: transformers\ntags:\n- mixture-of-experts\n---\n\n# {name}\n\n"
    (folder / CARD_NAME).write_text(head + report.card_section(), encoding="utf-8")
