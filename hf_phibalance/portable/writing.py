"""The folder of an export: an ordinary checkpoint, looked at by a process that does not have this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..forwards import evaluating
from ..reporting import auto_class_name
from .report import ExportReport


REPORT_NAME = "export.json"
CARD_NAME = "README.md"
# Of a processor, beside what its tokenizer writes.
BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
ALLOWED = {
    torch.float32: 1e-4,
    torch.float64: 1e-4,
}  # of the largest logit, between two processes; else in half precision
ALLOWED_IN_HALF = 2e-2


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
    device_map: str | None,
    trust_remote_code: bool,
    check: bool,
) -> None:
    """
    Writes the unpatched `model` to `destination`, all of it or nothing.

    Args:
        example (`Mapping[str, torch.Tensor]`): a batch, whose logits have to be the same where the result is loaded.
        check (`bool`): whether to load the result in a process without this package.

    Raises:
        ValueError: if the result does not load, or is another model there.
    """
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        saved: Any = model
        saved.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _copy_beside(report.source, partial)
        if check:
            report.loaded_alone = _load_alone(saved, partial, example, device_map, trust_remote_code)
        (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        _write_card(report, partial)
        with suppress(FileNotFoundError):
            destination.rmdir()  # an empty one
        os.replace(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_beside(source: str, folder: Path) -> None:
    for name in BESIDE:
        if (Path(source) / name).is_file() and not (folder / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


def _load_alone(
    model: Any, folder: Path, example: Mapping[str, torch.Tensor], device_map: str | None, trust_remote_code: bool
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
        auto_class = auto_class_name(config.model_type, [type(model).__name__])
        script = Path(__file__).with_name("alone.py")
        words = [
            sys.executable,
            "-I",
            str(script),
            str(folder),
            auto_class,
            path,
            device_map or "",
            str(trust_remote_code),
        ]
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
