"""What a training run leaves behind: its figures, log and loads as JSON, and the evaluations made of it since."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..reporting import IMAGE_CLASS, TEXT_CLASS, auto_class_name, versions
from ..routers import unwrap
from .stored import read_evaluation, read_history, read_summary


logger = logging.get_logger(__name__)
SUMMARY_NAME = "metrics.json"
HISTORY_NAME = "history.json"
EVALUATIONS = "eval-*.json"  # what recipes/evaluate.py writes
BASELINE_FOLDERS = ("unbalanced", "baseline")


def described(model: Any) -> dict[str, str]:
    """What a summary says of a model, wrapped or not: its type, and the class that loads it."""
    root: Any = unwrap(model)[-1]
    model_type = str(root.config.model_type)
    return {
        "model_type": model_type,
        "auto_class": auto_class_name(model_type, [cls.__name__ for cls in type(root).__mro__]),
    }


@dataclass
class Run:
    """
    What was measured in one training run.

    Args:
        summary (`dict`): The figures that a reader looks for first, and the settings behind them.
        log_history (`list[dict]`): The log of the trainer.
        loads (`list[dict]`): `{"step": int, "load": {layer name: relative load of each expert}}` at each logging step.
        evaluations (`list[dict]`, *optional*): Results of `recipes/evaluate.py` for the trained model.
    """

    summary: dict[str, Any]
    log_history: list[dict[str, Any]]
    loads: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def auto_class(self) -> str:
        """Name of the class that loads the model."""
        return IMAGE_CLASS if self.summary.get("auto_class") == IMAGE_CLASS else TEXT_CLASS

    @classmethod
    def of(
        cls,
        trainer: Any,
        balance: PhiBalanceConfig,
        loads: list[dict[str, Any]],
        before: Mapping[str, float] | None = None,
        **figures: Any,
    ) -> Run:
        """
        Collects the figures of a finished run.

        Args:
            trainer ([`~transformers.Trainer`]): After training, and after an evaluation with the prefix `"test"`.
            balance (`PhiBalanceConfig`): The configuration that the run had.
            loads (`list[dict]`): The `history` of the callback that [`attach`] returned.
            before (`Mapping[str, float]`, *optional*):
                What `trainer.evaluate` returned for the same held-out data before training.
            figures: Further entries of the summary.
        """
        run = cls({}, [dict(entry) for entry in trainer.state.log_history], loads)
        max_vio = [value for _, value in run.series("moe/max_vio")]
        tenth = max(1, len(max_vio) // 10)
        run.summary = {
            **described(trainer.model),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),  # ZeRO-3 or not
            "steps": trainer.state.global_step,
            "seed": trainer.args.seed,
            "balance": balance.to_dict() if balance.is_on else None,
            # means over the first and the last tenth of the logged training steps
            "max_vio": {"start": _mean(max_vio[:tenth]), "end": _mean(max_vio[-tenth:])},
            "noise_floor": _last(run.series("moe/noise_floor")),
            "held_out": {
                name: _last(run.series(f"test_{key}"))
                for name, key in (
                    ("loss", "loss"),
                    ("max_vio", "moe/max_vio"),
                    ("gini", "moe/gini"),
                    ("dead_experts", "moe/dead_experts"),
                )
            },
            "versions": versions(),
            **figures,
        }
        if before is not None:
            run.note_before(before)
        return run

    def note_before(self, metrics: Mapping[str, float]) -> None:
        """
        Notes the balance of the untrained model.

        Args:
            metrics (`Mapping[str, float]`): What `trainer.evaluate` returned before training, with any prefix.
        """
        marked = {key.partition("moe/")[2]: value for key, value in metrics.items() if "moe/" in key}
        layers = {key.partition("/")[2]: value for key, value in marked.items() if key.startswith("max_vio/")}
        if layers:
            self.summary["before"] = {"max_vio": marked.get("max_vio"), "max_vio_per_layer": layers}

    def layers(self) -> dict[str, dict[str, float]]:
        """
        MaxVio of every shown layer by what it was measured on, as far as it was: held-out data before and after
        training, or else training steps.
        """
        held_out: list[dict[str, Any]] = []
        for prefix in ("test_", "eval_"):
            held_out = held_out or [entry for entry in self.log_history if f"{prefix}moe/max_vio" in entry]
        before = self.summary.get("before", {}).get("max_vio_per_layer", {})
        if not before and held_out and held_out[0].get("step") == 0:
            before = _per_layer(held_out[0])
        after = _per_layer(held_out[-1]) if held_out else {}
        steps = [entry for entry in self.log_history if "moe/max_vio" in entry]
        tenth = max(1, len(steps) // 10)
        columns = {"held-out data, before": before}
        if not (before and after):
            columns["training steps, first tenth"] = _mean_per_layer(steps[:tenth])
            columns["training steps, last tenth"] = _mean_per_layer(steps[-tenth:])
        columns["held-out data, after"] = after
        return {name: column for name, column in columns.items() if column}

    def series(self, key: str) -> list[tuple[int, float]]:
        """`(step, value)` of every log entry that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.log_history if key in entry]

    @property
    def name(self) -> str:
        """What the run is called in pictures and tables."""
        balance = self.summary["balance"]
        if not balance:
            return "unbalanced"
        return "φ-balanced" if method_of(balance) == "phi" else method_of(balance)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `metrics.json` (the summary) and `history.json` (log and loads) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY_NAME).write_text(json.dumps(self.summary, indent=2, sort_keys=True) + "\n")
        history = {"log_history": self.log_history, "loads": self.loads}
        (folder / HISTORY_NAME).write_text(json.dumps(history) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Run:
        """
        Reads what [`~Run.save`] wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: naming the file and what in it is not as it should be.
        """
        folder = Path(folder)
        missing = [name for name in (SUMMARY_NAME, HISTORY_NAME) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: give a results folder of recipes/sft.py")
        history = read_history(folder / HISTORY_NAME)
        return cls(read_summary(folder / SUMMARY_NAME), **history, evaluations=load_evaluations(folder))

    @classmethod
    def load_baseline(cls, folder: str | os.PathLike) -> Run | None:
        """The run that the report in `folder` shows beside its own, if there is one."""
        for name in BASELINE_FOLDERS:
            if (Path(folder) / name / SUMMARY_NAME).is_file():
                return cls.load(Path(folder) / name)
        return None


def load_evaluations(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Results of `recipes/evaluate.py` in a results folder (`eval-*.json`), each with its `file` name.

    Raises:
        ValueError: naming the one that is damaged.
    """
    found = []
    for path in sorted(Path(folder).glob(EVALUATIONS)):
        result = read_evaluation(path)
        if "metrics" in result:
            found.append({**result, "file": path.name})
        else:
            logger.warning(f"{path} has no `metrics` and is left out of the report.")
    return found


def method_of(balance: Mapping[str, Any]) -> str:
    """Name of the method of a saved `PhiBalanceConfig`."""
    return balance.get("method", "phi")  # runs of earlier versions knew no other


def _per_layer(entry: Mapping[str, Any]) -> dict[str, float]:
    """MaxVio by layer in a log entry of training or of an evaluation."""
    return {key.partition("moe/max_vio/")[2]: value for key, value in entry.items() if "moe/max_vio/" in key}


def _mean_per_layer(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    columns: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in _per_layer(entry).items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last(points: list[tuple[int, float]]) -> float | None:
    return points[-1][1] if points else None
