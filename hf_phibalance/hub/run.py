"""Reads and writes what a training run measured, with lm-evaluation-harness's results for its model."""

import json
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..balancing import get_balancer
from ..config import PhiBalanceConfig
from ..files import LARGE, public_name, read_json, versions
from ..models import AutoClass, auto_class_name
from ..routers import unwrap


SUMMARY_NAME = "metrics.json"
HISTORY_NAME = "history.json"
HISTORY = ("log_history", "loads")  # fields of a run that HISTORY_NAME holds
BASELINE_FOLDERS = ("unbalanced", "baseline")
PER_LAYER = "moe/max_vio/"
AGAIN = "Run it again, or remove the file."


def own_file(path: Path) -> Path:
    """Returns `path`. Raises `ValueError` if it is a link (symbolic or hard) or not a regular file."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ValueError(
            f"{path} is a link or no regular file. It may lead to a private file: put a copy in its place."
        )
    return path


@strict
@dataclass
class Score:
    """One figure of an evaluation. `metric` is `"metric,filter"` as in lm-evaluation-harness."""

    task: str
    metric: str
    value: int | float
    error: int | float | None = None
    shots: int | None = None
    problems: int | None = None  # answered
    of: int | None = None  # problems of the task
    dataset: str | None = None
    isolation: str | None = None  # how generated code was isolated from the machine

    @property
    def count(self) -> str:
        """How many problems were answered, for example `"200 of 1319"`."""
        return f"{self.problems or '?'}" if self.of in (None, self.problems) else f"{self.problems} of {self.of}"

    @classmethod
    def of_task(cls, task: str, file: dict[str, Any]) -> "list[Score]":
        """Returns the scores of `task` in a result file, and the expert load while the answers were generated."""
        counts = _object(_object(file, "n-samples"), task)
        about: dict[str, Any] = {
            "task": task,
            "shots": _object(file, "n-shot").get(task),
            "problems": counts.get("effective"),
            "of": counts.get("original"),
            "dataset": _object(_object(file, "configs"), task).get("dataset_path"),
            "isolation": file.get("isolation"),
        }
        load = _object(file, "expert_load")
        loads = {f"expert_load,{name}": load.get(name) for name in ("max_vio", "gini", "dead_experts")}
        values = {**_object(_object(file, "results"), task), **loads}
        numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
        errors = {name.replace("_stderr,", ",", 1): value for name, value in numbers.items() if "_stderr," in name}
        names = [name for name in numbers if "_stderr," not in name]
        return [cls(metric=name, value=numbers[name], error=errors.get(name), **about) for name in names]


@strict
@dataclass
class Run:
    """
    What one training run measured.

    Args:
        model_type (`str`): `model_type` of the config.
        auto_class (`str`): name of the class of this package that loads the model.
        parameters (`int`): parameters of the model.
        steps (`int`): optimizer steps.
        versions (`dict[str, str]`): versions of the packages that the run used.
        balance (`PhiBalanceConfig`, *optional*): `None` if nothing was balanced.
        own_bias (`bool`, *optional*): whether a selection bias routes that plain transformers does not know.
        finished (`float`, *optional*): when the model was finished, in seconds since 1970.
        base_model, dataset (`str`, *optional*): names on the Hub, or the last part of a folder's path.
        task, example_prompt (`str`, *optional*): the task, and one prompt of it.
        problems (`dict[str, int]`): problems by split.
        exact_match (`dict[str, float]`): share of right answers, `untrained` and `trained`.
        before, held_out (`dict[str, float]`): loss and balance on held-out data before and after training.
        hyperparameters (`dict`): those that `Trainer` writes into its own cards.
        log_history (`list[dict]`): the log of the trainer.
        loads (`list[dict]`):
            `{"step": int, "load": {layer name: load of each expert over the mean load}}` at each logging step.
        evaluations (`dict[str, list[Score]]`): the newest scores of each task.
    """

    model_type: str
    auto_class: AutoClass
    parameters: int
    steps: int
    versions: dict[str, str]
    balance: PhiBalanceConfig | None = None
    own_bias: bool | None = None
    finished: int | float | None = None
    base_model: str | None = None
    dataset: str | None = None
    task: str | None = None
    example_prompt: str | None = None
    problems: dict[str, int] = field(default_factory=dict)
    exact_match: dict[str, int | float | None] = field(default_factory=dict)
    before: dict[str, int | float] = field(default_factory=dict)
    held_out: dict[str, int | float] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, list[Score]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base_model = self.base_model and public_name(self.base_model)
        self.dataset = self.dataset and public_name(self.dataset)

    @classmethod
    def of(
        cls,
        trainer: Any,
        balance: PhiBalanceConfig,
        loads: list[dict[str, Any]],
        before: Mapping[str, float] | None = None,
        **figures: Any,
    ) -> "Run":
        """
        Collects the figures of a finished run.

        Args:
            trainer ([`~transformers.Trainer`]): after training and an evaluation with the prefix `"test"` or `"eval"`.
            balance (`PhiBalanceConfig`): the configuration of the run.
            loads (`list[dict]`): the `history` of the callback that [`attach`] returned.
            before (`Mapping[str, float]`, *optional*): result of `trainer.evaluate` on the same data before training.
            figures: further fields of the run.
        """
        log = [dict(entry) for entry in trainer.state.log_history]
        tested = [entry for prefix in ("eval", "test") for entry in log if f"{prefix}_moe/max_vio" in entry]
        return cls(
            **described(trainer.model),
            parameters=sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),  # ZeRO-3 or not
            steps=trainer.state.global_step,
            balance=balance if balance.is_on else None,
            own_bias=has_own_bias(trainer.model),
            finished=time.time(),
            before=_without_prefix(before or {}),
            held_out=_without_prefix(tested[-1] if tested else {}),
            hyperparameters=extract_hyperparameters_from_trainer(trainer),
            log_history=log,
            loads=loads,
            **figures,
        )

    @property
    def name(self) -> str:
        """Name of the run in pictures and tables."""
        if self.balance is None:
            return "unbalanced"
        return "φ-balanced" if self.balance.method == "phi" else self.balance.method

    def series(self, key: str) -> list[tuple[int, float]]:
        """Returns `(step, value)` of every log entry that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.log_history if key in entry]

    def measured(self) -> dict[str, dict[str, int | float]]:
        """Returns the figures on held-out data, and means over the first and the last logged training steps."""
        steps = [entry for entry in self.log_history if "moe/max_vio" in entry]
        tenth, some = max(1, len(steps) // 10), max(1, len(self.loads) // 10)
        return {
            "held-out data, before": self.before,
            "first tenth of training": _means(steps[:tenth], self.loads[:some]),
            "last tenth of training": _means(steps[-tenth:], self.loads[-some:]),
            "held-out data, after": self.held_out,
        }

    def summary(self) -> str:
        """Returns the content of `metrics.json`."""
        figures = {key: value for key, value in vars(self).items() if key not in (*HISTORY, "evaluations")}
        return json.dumps({**figures, "balance": self.balance and self.balance.to_dict()}, indent=2) + "\n"

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `metrics.json`, and `history.json` with log and loads, into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, SUMMARY_NAME).write_text(self.summary())
        Path(folder, HISTORY_NAME).write_text(json.dumps({name: getattr(self, name) for name in HISTORY}) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Run":
        """
        Reads what [`~Run.save`] wrote, and results of lm-evaluation-harness (`results_*.json`) below `folder`, without
        those from before the run was finished: they are of an earlier model. Skips unknown fields.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file or field cannot be used. The message names it.
        """
        folder = Path(folder)
        if missing := [name for name in (SUMMARY_NAME, HISTORY_NAME) if not (folder / name).exists()]:
            raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: give a results folder of recipes/sft.py")
        with _reading(folder / SUMMARY_NAME) as values:
            if isinstance(values.get("balance"), dict):
                values["balance"] = PhiBalanceConfig.from_dict(values["balance"])
            known = {entry.name for entry in fields(cls)} - {*HISTORY, "evaluations"}
            run = cls(**{key: value for key, value in values.items() if key in known})
        with _reading(folder / HISTORY_NAME) as values:
            for name in HISTORY:
                setattr(run, name, values.get(name))
        for path in sorted(folder.rglob("results_*.json"), key=lambda path: path.name):  # the name ends with the date
            owner = path.relative_to(folder).parts[0]
            if owner not in BASELINE_FOLDERS and not owner.startswith("checkpoint-"):
                with _reading(path) as values:
                    # the harness's date of its start: copying changes the times of files
                    if run.finished is None or values.get("date", run.finished) >= run.finished:
                        run.evaluations |= {task: Score.of_task(task, values) for task in _object(values, "results")}
        return run

    @classmethod
    def load_baseline(cls, folder: str | os.PathLike) -> "Run | None":
        """Reads the baseline run saved in `folder`, if there is one."""
        found = (Path(folder, name) for name in BASELINE_FOLDERS)
        return next((cls.load(path) for path in found if (path / SUMMARY_NAME).exists()), None)


def described(model: Any) -> dict[str, Any]:
    """Returns the fields of a [`Run`] that describe a model, and the versions of the packages."""
    root: Any = unwrap(model)[-1]
    model_type = str(root.config.model_type)
    auto_class = auto_class_name(model_type, [cls.__name__ for cls in type(root).__mro__])
    return {"model_type": model_type, "auto_class": auto_class, "versions": versions()}


def has_own_bias(model: Any) -> bool:
    """Returns whether a selection bias is in force that is not the family's own, so that a plain load loses it."""
    balancer = get_balancer(model)
    balancer.follow_adapter()
    rows = zip(balancer.sites, balancer.duals.biases)
    return any(bool(bias_E.any()) for site, bias_E in rows if not site.has_native_bias)


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """Context manager: yields the JSON object in `path`. Adds the file name to errors inside it."""
    values = read_json(own_file(path), AGAIN, LARGE)
    try:
        yield values
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error!s:.400}. {AGAIN}") from error


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the JSON object `values[key]`, or an empty one if it is missing."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise TypeError(f"Field {key!r} expected an object, got {found!r:.80}")
    return found


def _without_prefix(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the loss and the balance metrics of `trainer.evaluate`, without the prefix of their names."""
    short = {key.partition("_")[2]: value for key, value in metrics.items()}
    return {key: value for key, value in short.items() if key == "loss" or key.startswith("moe/")}


def _means(entries: Sequence[Mapping[str, Any]], loads: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns means of the balance metrics over log entries, and of each layer's MaxVio over the load history."""
    names = dict.fromkeys(key for entry in entries for key in entry if key.startswith("moe/"))
    means = {name: fmean(entry[name] for entry in entries if name in entry) for name in names}
    for layer in loads[0]["load"] if loads else ():
        means[f"{PER_LAYER}{layer}"] = fmean(max(one["load"][layer]) - 1 for one in loads)
    return means
