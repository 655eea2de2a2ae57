"""What a training run leaves behind: its figures as JSON, pictures of the loads and the learning, and a model card.

Pictures need matplotlib and the printed table needs rich (`pip install "hf_phibalance[recipes]"`); they are imported
where they are used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..methods import METHODS


logger = logging.get_logger(__name__)
SUMMARY_NAME = "metrics.json"
HISTORY_NAME = "history.json"
LOADS_NAME = "loads.png"
CURVES_NAME = "curves.png"
EVALUATIONS = "eval-*.json"  # what recipes/evaluate.py writes
EVAL_RESULTS_FOLDER = ".eval_results"
# settings of an evaluation that a card says elsewhere, or that mean nothing to a reader
UNINTERESTING = ("task", "problems", "prompts", "model", "model_name_or_path", "revision", "dataset_path")
BASELINE_FOLDERS = ("unbalanced", "baseline")
CARD_MARK = "<!-- hf_phibalance -->"  # tells the template's cards from others
TAGS = ("mixture-of-experts", "phi-balancing")  # the last one only of what was φ-balanced
MAX_LAYERS_SHOWN = 8
PACKAGES_SHOWN = ("hf_phibalance", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Benchmark:
    """
    Where the Hub knows a benchmark from.

    Args:
        name (`str`): What people call it.
        dataset (`str`): Its name on the Hub.
        config (`str`): Configuration of the dataset.
        problems (`int`): Problems of the test split; a score of fewer is not the benchmark's.
        metric (`str`): The metric that its leaderboard shows.
        task_id (`str`, *optional*): Its task in `.eval_results`, if the Hub keeps a leaderboard of it.
    """

    name: str
    dataset: str
    config: str
    problems: int
    metric: str
    task_id: str | None = None


BENCHMARKS = {
    "gsm8k": Benchmark("GSM8K", "openai/gsm8k", "main", 1319, "strict_match", "gsm8k"),
    "humaneval": Benchmark("HumanEval", "openai/openai_humaneval", "openai_humaneval", 164, "pass@1"),
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
            "model_type": trainer.model.config.model_type,
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
        return "φ-balanced" if _method(balance) == "phi" else _method(balance)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `metrics.json` (the summary) and `history.json` (log and loads) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY_NAME).write_text(json.dumps(self.summary, indent=2, sort_keys=True) + "\n")
        history = {"log_history": self.log_history, "loads": self.loads}
        (folder / HISTORY_NAME).write_text(json.dumps(history) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Run:
        """Reads what [`~Run.save`] wrote."""
        folder = Path(folder)
        missing = [name for name in (SUMMARY_NAME, HISTORY_NAME) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: give a results folder of recipes/sft.py")
        history = json.loads((folder / HISTORY_NAME).read_text())
        return cls(json.loads((folder / SUMMARY_NAME).read_text()), **history, evaluations=load_evaluations(folder))

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
        ValueError: if one of them is not JSON.
    """
    found = []
    for path in sorted(Path(folder).glob(EVALUATIONS)):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}): run its evaluation again, or remove it.") from error
        if isinstance(result, dict) and isinstance(result.get("metrics"), dict):
            found.append({**result, "file": path.name})
        else:
            logger.warning(f"{path} has no `metrics` and is left out of the report.")
    return found


def versions() -> dict[str, str]:
    """Versions of the installed packages that a result depends on."""
    found = {}
    for name in PACKAGES_SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_report(
    folder: str | os.PathLike,
    run: Run,
    baseline: Run | None,
    card_template: str | os.PathLike | None = None,
    dpi: int = 130,
) -> None:
    """
    Writes JSON metrics, pictures and the model card of a run.

    Args:
        folder (`str` or `os.PathLike`): The results folder.
        run (`Run`): The run.
        baseline (`Run`, *optional*): A run to show beside it; kept in the folder, so that the card can be made again.
        card_template (`str` or `os.PathLike`, *optional*): Template of the model card, else [`find_template`]'s.
        dpi (`int`, *optional*, defaults to `130`): Resolution of the pictures.
    """
    folder = Path(folder)
    run.save(folder)
    if baseline is not None and Run.load_baseline(folder) is None:
        baseline.save(folder / BASELINE_FOLDERS[-1])
    draw(folder, run, baseline, dpi)
    model_card(run, baseline, card_template, title=folder.name, pictures=pictures_in(folder)).save(
        folder / "README.md"
    )


def draw(folder: str | os.PathLike, run: Run, baseline: Run | None, dpi: int = 130) -> None:
    """Draws the pictures of a report into `folder`."""
    runs = [run] if baseline is None else [baseline, run]
    plot_loads(runs, Path(folder) / LOADS_NAME, dpi)
    plot_curves(runs, Path(folder) / CURVES_NAME, dpi)


def pictures_in(folder: str | os.PathLike) -> list[str]:
    """Names of the report's pictures that are in `folder`."""
    return [name for name in (LOADS_NAME, CURVES_NAME) if (Path(folder) / name).is_file()]


def find_template() -> Path:
    """
    The template of the model card, `model_cards/template.md` of the source tree or as installed.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    source = Path(__file__).parents[2] / "model_cards" / "template.md"
    if source.is_file():
        return source
    beside = Path(__file__).parents[2] / "share" / "hf_phibalance" / "template.md"  # as pip --target has it
    recorded = [Path(str(file.locate())) for file in importlib.metadata.files("hf_phibalance") or ()]
    for path in (beside, *recorded):
        if path.parts[-2:] == ("hf_phibalance", "template.md") and path.is_file():
            return path
    raise FileNotFoundError(f"there is no model card template at {source}: install hf_phibalance again, or pass one.")


# ---------------------------------------------------------------------- pictures


def plot_loads(runs: list[Run], path: str | os.PathLike, dpi: int = 130) -> None:
    """
    Load heatmaps over training, one panel per run: x the step, y layer and expert, colour the relative load.

    Models with more than eight routers are shown by eight of them, evenly spaced.
    """
    from matplotlib.figure import Figure

    layers = _shown_layers(runs)
    sizes = [len(runs[0].loads[0]["load"][layer]) for layer in layers] if layers else []
    height = min(2.0 + 0.16 * sum(sizes), 14.0)
    figure = Figure(figsize=(1.5 + 5.2 * len(runs), max(height, 3.5)), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    image = None
    for panel, run in zip(panels, runs):
        steps = [entry["step"] for entry in run.loads]
        table = [[value for layer in layers for value in entry["load"][layer]] for entry in run.loads]
        if table:
            image = panel.pcolormesh(
                _edges(steps), range(sum(sizes) + 1), list(zip(*table)), cmap="RdBu_r", vmin=0.0, vmax=2.0
            )
        edge = 0
        for size in sizes[:-1]:
            edge += size
            panel.axhline(edge, color="black", linewidth=1.2)
        panel.set_title(run.name)
        panel.set_xlabel("optimizer step")
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    panels[0].set_yticks([start + size / 2 for start, size in zip(starts, sizes)], [_short(name) for name in layers])
    panels[0].set_ylabel("layer; one row per expert")
    panels[0].invert_yaxis()
    figure.suptitle(f"Expert load over training, {runs[-1].summary['model_type']}")
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="relative load (1 = fair share)", extend="max")
    figure.savefig(path, dpi=dpi)


def plot_curves(runs: list[Run], path: str | os.PathLike, dpi: int = 130) -> None:
    """MaxVio, exact match and loss over training, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    curves = (
        ("moe/max_vio", "MaxVio of training steps", "MaxVio (0 = balanced)"),
        ("eval_exact_match", "Exact match on validation problems", "exact match"),
        ("loss", "Training loss", "loss per answer token"),
    )
    for panel, (key, title, label) in zip(panels, curves):
        for run in runs:
            points = run.series(key)
            if points:
                marker = "o" if len(points) < 30 else None
                panel.plot(
                    *zip(*points),
                    label=run.name,
                    color=_COLOURS.get(run.name, "tab:blue"),
                    marker=marker,
                    markersize=4,
                )
        panel.set_title(title)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    floor = runs[-1].series("moe/noise_floor")
    if floor:
        panels[0].plot(*zip(*floor), label="noise floor", color="grey", linestyle="--", linewidth=1)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.02)
    panels[2].set_yscale("log")
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.savefig(path, dpi=dpi)


_COLOURS = {"φ-balanced": "tab:blue", "unbalanced": "tab:orange"}


def _shown_layers(runs: list[Run]) -> list[str]:
    """Routers that every run has, at most eight."""
    recorded = [list(run.loads[0]["load"]) for run in runs if run.loads]
    if not recorded:
        return []
    names = [name for name in recorded[0] if all(name in other for other in recorded)]
    if len(names) <= MAX_LAYERS_SHOWN:
        return names
    return [names[round(i * (len(names) - 1) / (MAX_LAYERS_SHOWN - 1))] for i in range(MAX_LAYERS_SHOWN)]


def _short(layer: str) -> str:
    """`model.layers.3.mlp.gate` as `layer 3`, and other names as they are."""
    parts = layer.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else layer


def _edges(steps: list[int]) -> list[float]:
    """Borders of the cells whose right edges are `steps`."""
    return [0.0 if len(steps) < 2 else max(0.0, steps[0] - (steps[1] - steps[0])), *map(float, steps)]


# ---------------------------------------------------------------------- words


def model_card(
    run: Run,
    baseline: Run | None = None,
    template: str | os.PathLike | None = None,
    *,
    title: str,
    base_model: str | None = None,
    licence: Mapping[str, str] | None = None,
    library_name: str = "transformers",
    repo_id: str | None = None,
    pictures: Sequence[str] = (LOADS_NAME, CURVES_NAME),
) -> Any:
    """
    The model card of a run; it says only what was measured.

    Args:
        run (`Run`): The run. Whatever its summary lacks, the card leaves out.
        baseline (`Run`, *optional*): A run to show beside it.
        template (`str` or `os.PathLike`, *optional*): A Jinja template, else [`find_template`]'s.
        title (`str`): Name of the model.
        base_model (`str`, *optional*): What was fine-tuned, if not the summary's `base_model`.
        licence (`Mapping[str, str]`, *optional*):
            `license`, `license_name` and `license_link` of the base model, as far as it has them.
        library_name (`str`, *optional*, defaults to `"transformers"`): `"peft"` for an adapter.
        repo_id (`str`, *optional*): Where the model will be on the Hub.
        pictures (`Sequence[str]`, *optional*): The report's pictures that lie beside the card.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    summary, licence = run.summary, dict(licence or {})
    base_model = base_model or summary.get("base_model")
    base_name = base_model and (Path(base_model).name if Path(base_model).exists() else base_model)
    hub_base = base_model if base_name == base_model else None  # a folder is no name on the Hub
    dataset = summary.get("dataset")
    hub_dataset = None if dataset in (None, "toy") or Path(dataset).exists() else dataset
    generated = "generated Python problems" if summary.get("task") == "mbpp" else "generated GSM8K-format problems"
    dataset_text = hub_dataset or (generated if dataset == "toy" else None)
    if dataset_text is None and dataset:
        dataset_text = Path(dataset).name
    results = _eval_results(run, hub_dataset, dataset_text)
    data = ModelCardData(
        model_name=title,
        base_model=hub_base,
        library_name=library_name,
        pipeline_tag="text-generation",
        language="en" if dataset else None,
        tags=[*tags(summary.get("balance")), summary["model_type"]],
        datasets=[hub_dataset] if hub_dataset else None,
        eval_results=results or None,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    if not results:  # it belongs to the model-index alone
        data.pop("model_name")
    return ModelCard.from_template(
        data,
        template_path=str(template or find_template()),
        title=title,
        summary=summary,
        base_name=base_name,
        dataset_text=dataset_text,
        columns=[run.name] if baseline is None else [baseline.name, run.name],
        rows=[row for row in summary_rows(run, baseline) if row[0] != "seconds"],  # of a machine that nobody knows
        command=without_paths(summary.get("command")),
        has_exact_match=(summary.get("exact_match") or {}).get("trained") is not None,
        layer_table=layer_table(run, baseline),
        balance=balance_text(summary["balance"]) if summary.get("balance") else None,
        routers=routers_text(summary["balance"]) if summary.get("balance") else None,
        flag=_flag(summary.get("balance")) if library_name == "peft" else "True",
        mark=CARD_MARK,
        evaluations=[evaluation_text(evaluation) for evaluation in run.evaluations],
        has_bias=bool(summary.get("balance") and summary["balance"]["bias_coef"]),
        is_adapter=library_name == "peft",
        licence=licence.get("license_name") or licence.get("license"),
        repo_id=repo_id,
        loads_picture=LOADS_NAME if LOADS_NAME in pictures else None,
        curves_picture=CURVES_NAME if CURVES_NAME in pictures else None,
    )


def layer_table(run: Run, baseline: Run | None = None) -> str:
    """MaxVio layer by layer, before and after, as a Markdown table; empty if no layer was measured."""
    columns = run.layers()
    after = baseline.layers().get("held-out data, after") if baseline is not None else None
    if columns and after:
        columns[f"{baseline.name} run, held-out data, after"] = after  # type: ignore[union-attr]
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not names:
        return ""
    lines = [
        f"| MaxVio of | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(
            f"| `{name}` | "
            + " | ".join(f"{column[name]:.3f}" if name in column else "–" for column in columns.values())
            + " |"
            for name in names
        ),
    ]
    return "\n".join(lines)


def balance_section(run: Run) -> str:
    """What a card that somebody else wrote should say about the balance of the model, as Markdown."""
    balance = run.summary["balance"]
    lines = [
        BALANCE_HEADING,
        "",
        f"This model was trained with {routers_text(balance)}: {balance_text(balance)}."
        if balance
        else "The loads of the routers were counted; nothing was balanced.",
        "MaxVio is (greatest load of an expert − mean load) / mean load: 0 is balance.",
        "`phb.AutoModelForCausalLM.from_pretrained(..., phi_balance=True)` of `hf_phibalance` brings back the prices and "
        "means from `phi_balance.safetensors`.",
    ]
    table = layer_table(run)
    return "\n".join([*lines, *(["", table] if table else [])]) + "\n"


BALANCE_HEADING = "## Expert balance"


def _method(balance: Mapping[str, Any]) -> str:
    return balance.get("method", "phi")  # runs of earlier versions knew no other


def tags(balance: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The Hub's tags of a model with this `PhiBalanceConfig`."""
    return TAGS if not balance or _method(balance) == "phi" else TAGS[:-1]


def routers_text(balance: Mapping[str, Any]) -> str:
    """How the routers of a model were balanced, and where that is published, as Markdown."""
    if _method(balance) == "phi":
        return "φ-balanced routers ([arXiv 2605.15403](https://arxiv.org/abs/2605.15403))"
    return f"routers balanced by the method `{_method(balance)}` ({METHODS[_method(balance)].source})"


def balance_text(balance: Mapping[str, Any]) -> str:
    """The fields of a `PhiBalanceConfig` in one line."""
    return ", ".join(f"`{key}={value}`" for key, value in balance.items() if key != "version" and value != {})


def _flag(balance: Mapping[str, Any] | None) -> str:
    """What `phi_balance=` is to be where no config beside the weights says it: an adapter has none."""
    default = PhiBalanceConfig().to_dict()
    return (
        str({key: value for key, value in balance.items() if value != default.get(key)} or True) if balance else "True"
    )


# ---------------------------------------------------------------------- evaluations


def evaluation_text(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation as a card shows it: `name`, `rows` of metric and value, `settings` and `command`."""
    benchmark, counted = _benchmark(evaluation), _problems(evaluation)
    name = benchmark.name if benchmark else _task(evaluation)
    if counted is not None:
        whole = benchmark is not None and counted >= benchmark.problems
        name += f", all {counted} problems" if whole else f", {counted} problems"
    shown = {
        key: value
        for key, value in _settings(evaluation).items()
        if key not in UNINTERESTING
        and isinstance(value, str | int | float)
        and value is not False
        and not _is_path(value)
    }
    rows = [(metric, f"{value:.4f}") for metric, value in _numbers(evaluation["metrics"]).items()]
    balance = evaluation.get("balance")
    if isinstance(balance, Mapping) and "max_vio" in balance:
        rows.append(("MaxVio over prompts and completions", f"{balance['max_vio']:.3f}"))
    return {
        "name": name,
        "rows": rows,
        "settings": ", ".join(f"{key} {value}" for key, value in shown.items()),
        "command": without_paths(evaluation.get("command")),
    }


def _settings(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = evaluation.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _task(evaluation: Mapping[str, Any]) -> str:
    """Name of the task, from the file's if the result does not say it."""
    task = evaluation.get("task") or _settings(evaluation).get("task") or Path(evaluation["file"]).stem[len("eval-") :]
    return f"generated {task} problems" if _settings(evaluation).get("dataset_path") == "toy" else str(task)


def _benchmark(evaluation: Mapping[str, Any]) -> Benchmark | None:
    return BENCHMARKS.get(_task(evaluation).lower())


def eval_result_files(run: Run, date: str | None = None) -> dict[str, str]:
    """
    The contents of `.eval_results` by file name: scores of whole benchmarks that the Hub keeps a leaderboard of.

    Args:
        run (`Run`): The run with its evaluations.
        date (`str`, *optional*): ISO date of results that do not say when they were made.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for evaluation in run.evaluations:
        benchmark = _benchmark(evaluation)
        score = _numbers(evaluation["metrics"]).get(benchmark.metric) if benchmark else None
        if benchmark is None or benchmark.task_id is None or score is None:
            continue
        if (_problems(evaluation) or 0) < benchmark.problems:  # also if it is unknown how many they were
            continue
        settings = evaluation_text(evaluation)["settings"]
        entry = EvalResultEntry(
            dataset_id=benchmark.dataset,
            task_id=benchmark.task_id,
            value=round(100 * score, 2),  # per cent, as the leaderboards have it
            date=evaluation.get("date") or date,
            notes=f"{benchmark.metric}, {settings}" if settings else benchmark.metric,
        )
        files[f"{Path(evaluation['file']).stem.removeprefix('eval-')}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True
        )
    return files


def without_paths(command: Any) -> str | None:
    """A command line with absolute paths cut to their last part: where files lie on one machine helps nobody else."""
    if not command:
        return None
    try:
        words = (
            [str(word) for word in command] if isinstance(command, Sequence) and not isinstance(command, str) else None
        )
        words = shlex.split(str(command)) if words is None else words
    except ValueError:
        return str(command)
    return shlex.join(Path(word).name if _is_path(word) else word for word in words)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _problems(evaluation: Mapping[str, Any]) -> int | None:
    """How many problems an evaluation had, if it says so."""
    for source in (evaluation, _settings(evaluation)):
        for key in ("problems", "num_problems", "examples", "n"):
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, list):
                return len(value)
    return None


def _eval_results(run: Run, hub_dataset: str | None, dataset_text: str | None) -> list[Any]:
    """Entries of the model-index: the recipe's own exact match, and every evaluation."""
    from huggingface_hub import EvalResult

    results = []
    trained = (run.summary.get("exact_match") or {}).get("trained")
    if trained is not None and dataset_text:
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Math word problems",
                dataset_type=hub_dataset or ("generated" if run.summary.get("dataset") == "toy" else "local"),
                dataset_name=dataset_text,
                dataset_split="test",
                metric_type="exact_match",
                metric_name="exact match (strict match, no examples, greedy)",
                metric_value=round(trained, 4),
            )
        )
    for evaluation in run.evaluations:
        shown = evaluation_text(evaluation)
        benchmark = _benchmark(evaluation)
        for metric, value in _numbers(evaluation["metrics"]).items():
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    dataset_type=benchmark.dataset if benchmark else "local",
                    dataset_name=shown["name"],
                    dataset_config=benchmark.config if benchmark else None,
                    dataset_split="test",
                    metric_type=metric,
                    metric_name=f"{metric} ({shown['settings']})" if shown["settings"] else metric,
                    metric_value=round(value, 4),
                )
            )
    return results


def summary_rows(run: Run, baseline: Run | None = None) -> list[list[str]]:
    """The figures of a run, beside those of `baseline` if there is one: rows of a name and one text per run."""
    summaries = [run.summary] if baseline is None else [baseline.summary, run.summary]
    rows: list[list[str]] = []
    for label, keys, form in (
        ("exact match, untrained", ("exact_match", "untrained"), "{:.1%}"),
        ("exact match, trained", ("exact_match", "trained"), "{:.1%}"),
        ("MaxVio per step, first tenth of training", ("max_vio", "start"), "{:.3f}"),
        ("MaxVio per step, last tenth of training", ("max_vio", "end"), "{:.3f}"),
        ("MaxVio over all held-out problems, untrained", ("before", "max_vio"), "{:.3f}"),
        ("MaxVio over all held-out problems", ("held_out", "max_vio"), "{:.3f}"),
        ("Gini over all held-out problems", ("held_out", "gini"), "{:.3f}"),
        ("dead experts on held-out problems", ("held_out", "dead_experts"), "{:.0f}"),
        ("loss on held-out problems", ("held_out", "loss"), "{:.4f}"),
        ("seconds", ("seconds",), "{:.0f}"),
    ):
        values = []
        for summary in summaries:
            value: Any = summary
            for key in keys:
                value = None if value is None else value.get(key)
            values.append("–" if value is None else form.format(value))
        if any(value != "–" for value in values):
            rows.append([label, *values])
    return rows


def print_summary(folder: str | os.PathLike, run: Run, baseline: Run | None, seconds: float) -> None:
    """Prints the figures as a table, and where the results are."""
    from rich.console import Console
    from rich.table import Table

    summary = run.summary
    table = Table(title=f"{summary['model_type']}, {summary['parameters'] / 1e6:.2f} M parameters")
    table.add_column("")
    for shown in [run] if baseline is None else [baseline, run]:
        table.add_column(shown.name, justify="right")
    for row in summary_rows(run, baseline):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Results in {folder} after {seconds:.0f} s: model, {SUMMARY_NAME}, {LOADS_NAME}, {CURVES_NAME}")


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
