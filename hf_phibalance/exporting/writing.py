"""Writes an export: its report, and a folder with an ordinary checkpoint. A process without this package checks it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..balancing import Measurement, evaluating
from ..files import LARGE, find_file, flush_tree, layer_labels, public_name, read_json, versions
from ..hub import CARD_NAME, as_code, markdown_table
from ..models import auto_class_name, load_tokenizer, open_weights


logger = logging.get_logger(__name__)
REPORT_NAME = "export.json"
UNFINISHED = ".phibalance-unfinished"
MEANINGS = {  # what a variant is, and what was done to the bias
    "biased": ("as trained, with the bias", ""),
    "dropped": ("bias dropped", "was dropped"),
    "folded": (
        "bias folded into the routers",
        "was folded into the weights of the routers (a ridge regression of the shifts that it stands for on their inputs)",
    ),
    "rebalanced": (
        "folded, loads rebalanced",
        "was folded into the weights of the routers, whose loads were then moved nearer to those with the bias",
    ),
}
OF_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
COPIED = (*OF_PROCESSORS, "chat_template.json")
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-4}  # difference of two processes, as a share of the largest logit
ALLOWED_IN_HALF = 2e-2
PROMISES = re.compile(r"(num_)?(mtp|nextn)\w*_layers")  # config fields of multi-token prediction


@dataclass
class ExportReport:
    """
    What [`export`] did.

    Attributes:
        source (`str`): the exported checkpoint.
        bias (`str`): the bias it had: `"native"` (the family's own), `"ours"` (in `phi_balance.state`) or `"none"`.
        base (`str`, *optional*): the base model that the adapter `source` was merged into.
        kept (`str`, *optional*): the variant that was written, if there was a choice.
        variants (`dict[str, Measurement]`): the figures of each variant on texts, if any were given.
        r2 (`dict[str, float]`): by layer name, see [`FoldReport`].
        fitted_tokens (`int`): number of tokens that the fold was fitted on. The variants are measured on others.
        max_loss_increase (`float`): the allowed increase of the loss.
        forced (`bool`): whether a larger increase was allowed, too.
        loaded_alone (`dict`, *optional*): what a process without this package found in the result.
    """

    source: str
    bias: str
    base: str | None = None
    kept: str | None = None
    variants: dict[str, Measurement] = field(default_factory=dict)
    r2: dict[str, float] = field(default_factory=dict)
    fitted_tokens: int = 0
    max_loss_increase: float = 0.0
    forced: bool = False
    loaded_alone: dict[str, Any] | None = None

    def loss_increase(self, variant: str | None = None) -> float:
        """Returns the loss of a variant (default: the kept one) minus the loss with the bias."""
        variant = variant or self.kept
        if variant is None or "biased" not in self.variants:
            return 0.0
        return float(self.variants[variant].loss or 0.0) - float(self.variants["biased"].loss or 0.0)

    @property
    def summary(self) -> str:
        """What was done to the adapter and to the bias."""
        merged = f"The adapter was merged into {as_code(public_name(self.base))}. " if self.base else ""
        if self.bias == "native":
            return f"{merged}The selection bias is the family's own: it is in the weights, and every engine knows it."
        if self.kept is None:
            return f"{merged}There is no selection bias that could be lost."
        return f"{merged}The selection bias, which no engine but hf_phibalance knows, {MEANINGS[self.kept][1]}."

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain JSON values."""
        layers = {
            name: {"r2": r2}
            | {f"max_vio_{variant}": figures.max_vio[name] for variant, figures in self.variants.items()}
            | {f"changed_{variant}": figures.changed[name] for variant, figures in self.variants.items()}
            for name, r2 in self.r2.items()
        }
        return {
            "source": public_name(self.source),
            "base": self.base and public_name(self.base),
            "bias": self.bias,
            "kept": self.kept,
            "loss_increase": self.loss_increase(),
            "max_loss_increase": self.max_loss_increase,
            "forced": self.forced,
            "variants": {name: figures.to_dict() for name, figures in self.variants.items()},
            "fitted_tokens": self.fitted_tokens,
            "layers": layers,
            "loaded_alone": self.loaded_alone,
            "versions": versions(),
        }

    def to_markdown(self) -> str:
        """Returns the summary and the table of the variants."""
        if not self.variants:
            return self.summary
        rows = []
        for name, figures in self.variants.items():
            mark = "**" if name == self.kept else ""
            row = [f"{mark}{MEANINGS[name][0]}{mark}", f"{figures.loss:.4f}", "", f"{figures.max_vio_global:.3f}", ""]
            if name != "biased":
                row[2], row[4] = f"{self.loss_increase(name):+.4f}", f"{figures.changed_share:.1%}"
            rows.append(row)
        tokens = next(iter(self.variants.values())).tokens
        fitted = " that the fold was not fitted on" if self.kept else ""
        head = ["variant", "loss", "increase", "MaxVio", "assignments changed"]
        return f"{self.summary}\n\nMeasured on {tokens:,} tokens{fitted}:\n\n{markdown_table(head, rows)}"

    def card_section(self) -> str:
        """Returns the section of the model card."""
        return (
            f"## Exported for any engine\n\nExported by `phibalance export`. {self.to_markdown()}\n\n"
            "It loads without `hf_phibalance`. Where this card mentions `phi_balance.state`, it describes the model that this one was "
            "exported from.\n"
        )


def print_export(report: ExportReport, console: Any) -> None:
    """Prints `report` to a [`rich.console.Console`]: the variants, and the layers of the kept one."""
    from rich.markdown import Markdown

    text = f"**{as_code(report.source)}**\n\n{report.to_markdown()}"
    if report.kept:
        biased, kept, rows = report.variants["biased"], report.variants[report.kept], []
        for (name, r2), label in zip(report.r2.items(), layer_labels(list(report.r2))):
            figures = [f"{r2:.3f}", f"{biased.max_vio[name]:.3f}", f"{kept.max_vio[name]:.3f}"]
            rows.append([as_code(label), *figures, f"{kept.changed[name]:.1%}"])
        table = markdown_table(["layer", "r²", "MaxVio, biased", f"MaxVio, {report.kept}", "changed"], rows)
        text += (
            f"\n\n{table}\n\nr²: how well one direction keeps the inputs of a router constant; a bias in its weight needs that. "
            "Changed: the share of assignments that differ from those with the bias."
        )
    console.print(Markdown(text))


# ---------------------------------------------------------------------- the folder


def check_destination(destination: Path) -> None:
    """Raises `ValueError` unless `destination` is new or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} must be a new or an empty folder: a checkpoint would mix with what is there.")
    destination.parent.mkdir(parents=True, exist_ok=True)  # fails now where nothing can be written


def find_tokenizer(source: str, named: str | os.PathLike | None, loading: dict[str, Any], needed: bool = False) -> Any:
    """Returns the tokenizer; `None` if there is none and none is needed."""
    try:
        return load_tokenizer(source, named, loading)
    except ValueError as error:
        if needed or named is not None:
            raise
        logger.warning(f"The result has no tokenizer: {error}.")
        return None


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """
    Context manager: yields a folder to write to, which becomes `destination` at the end, or is deleted after an error. An
    empty folder that is there stays (it may be a mount point), and gets the files.
    """
    destination = destination.resolve()
    partial = destination.with_name(f".{destination.name}{UNFINISHED}")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        if destination.exists():
            # config.json last: without it, nothing loads
            for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                shutil.move(path, destination)
            partial.rmdir()
        else:
            os.replace(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
    Writes the unpatched `model` to `destination`, completely or not at all. `not_loaded` names the source's tensors
    that transformers did not load, `loading` are the arguments that the weights were loaded with. With `check`, a
    process without this package loads the result; raises `ValueError` if its logits of the batch `example` differ.
    """
    weights_of = report.base or report.source
    with whole_folder(destination) as partial:
        saved: Any = model
        carried = _ignored_tensors(saved, weights_of, loading)
        saved.save_pretrained(partial, **({"state_dict": saved.state_dict() | carried} if carried else {}))
        _warn_of_missing(saved, report, {*carried, *not_loaded}, weight_files(partial, {}).keys())
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name in COPIED:
            path = find_file(weights_of, name, loading)
            if path is not None and not (partial / name).exists():
                shutil.copyfile(path, partial / name)
        if check:
            report.loaded_alone = _load_alone(saved, partial, example, loading)
        (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        _write_card(report, partial)


def weight_files(source: str | os.PathLike, loading: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{tensor name: safetensors file}` of a checkpoint."""
    path = find_file(source, SAFE_WEIGHTS_NAME, loading)
    if path is not None:
        with open_weights(path) as file:
            return dict.fromkeys(file.keys(), path)
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME, loading)
    if index is None:
        return {}
    shards = read_json(index, "Save the model again.", LARGE)["weight_map"]
    paths = {shard: find_file(source, shard, loading) for shard in set(shards.values())}
    if missing := sorted(shard for shard, path in paths.items() if path is None):
        raise ValueError(f"{missing[0]}, which {index} names, is missing. Download it again.")
    return {name: paths[shard] for name, shard in shards.items()}


def _ignored_tensors(model: Any, source: str, loading: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint that this class ignores on load: multi-token-prediction layers."""
    patterns = "|".join(f"(?:{pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ())
    own, found = model.state_dict().keys(), {}
    for name, path in weight_files(source, loading).items():
        if patterns and name not in own and re.search(patterns, name):
            with open_weights(path) as file:
                found[name] = file.get_tensor(name)
    return found


def _warn_of_missing(model: Any, report: ExportReport, wanted: set[str], written: Collection[str]) -> None:
    """Warns if the export lacks tensors of the source, or the source lacks layers that config.json promises."""
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


def _load_alone(
    model: Any, folder: Path, example: Mapping[str, torch.Tensor], loading: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads `folder` in a process without this package. Returns its findings; `ValueError` if the model differs."""
    inputs = {name: part.to(model.device) for name, part in example.items() if name != "labels"}
    with evaluating(model), torch.no_grad():
        logits = model(**inputs).logits
    auto_class = auto_class_name(model.config.model_type, [cls.__name__ for cls in type(model).__mro__])
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/example.safetensors"
        save_file({name: part.contiguous().cpu() for name, part in {**inputs, "logits": logits.float()}.items()}, path)
        words = [sys.executable, str(Path(__file__).with_name("alone.py")), str(folder), auto_class, path]
        words += [loading.get("device_map") or "", str(bool(loading.get("trust_remote_code")))]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise ValueError(f"the exported checkpoint does not load without hf_phibalance: {reason}")
    found = json.loads(done.stdout.strip().splitlines()[-1]) | {"warnings": done.stderr.splitlines()}
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
    """Writes the source's card plus the export section, or a new card with only that section."""
    source = Path(report.source) / CARD_NAME
    if source.is_file():
        head = source.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n"
        head = head.replace("\nlibrary_name: peft\n", "\nlibrary_name: transformers\n", 1)  # an adapter was merged
    else:
        title = as_code(Path(report.source).name)
        head = f"---\nlibrary_name: transformers\ntags:\n- mixture-of-experts\n---\n\n# {title}\n\n"
    (folder / CARD_NAME).write_text(head + report.card_section(), encoding="utf-8")
