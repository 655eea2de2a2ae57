"""What a training run leaves behind: its figures as JSON, pictures of the loads and the learning, and a model card.

Needs matplotlib, jinja2 and rich (`pip install "hf_phibalance[recipes]"`), which are imported where they are used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import PhiBalanceConfig


SUMMARY_NAME = "metrics.json"
HISTORY_NAME = "history.json"
LOADS_NAME = "loads.png"
CURVES_NAME = "curves.png"
MAX_LAYERS_SHOWN = 8


@dataclass
class Run:
    """
    What was measured in one training run.

    Args:
        summary (`dict`): The figures that a reader looks for first, and the settings behind them.
        log_history (`list[dict]`): The log of the trainer.
        loads (`list[dict]`): `{"step": int, "load": {layer name: relative load of each expert}}` at each logging step.
    """

    summary: dict[str, Any]
    log_history: list[dict[str, Any]]
    loads: list[dict[str, Any]]

    @classmethod
    def of(cls, trainer: Any, balance: PhiBalanceConfig, loads: list[dict[str, Any]], **figures: Any) -> Run:
        """
        Collects the figures of a finished run.

        Args:
            trainer ([`~transformers.Trainer`]): After training, and after an evaluation with the prefix `"test"`.
            balance (`PhiBalanceConfig`): The configuration that the run had.
            loads (`list[dict]`): The `history` of the callback that [`attach`] returned.
            figures: Further entries of the summary.
        """
        import torch
        import transformers
        import trl

        run = cls({}, [dict(entry) for entry in trainer.state.log_history], loads)
        max_vio = [value for _, value in run.series("moe/max_vio")]
        tenth = max(1, len(max_vio) // 10)
        run.summary = {
            "model_type": trainer.model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
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
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
            **figures,
        }
        return run

    def series(self, key: str) -> list[tuple[int, float]]:
        """`(step, value)` of every log entry that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.log_history if key in entry]

    @property
    def name(self) -> str:
        """What the run is called in pictures and tables."""
        return "φ-balanced" if self.summary["balance"] else "unbalanced"

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
        return cls(json.loads((folder / SUMMARY_NAME).read_text()), **json.loads((folder / HISTORY_NAME).read_text()))


def write_report(folder: str | os.PathLike, run: Run, baseline: Run | None, card_template: str | os.PathLike) -> None:
    """
    Writes JSON metrics, pictures and the model card of a run.

    Args:
        folder (`str` or `os.PathLike`): The results folder.
        run (`Run`): The run.
        baseline (`Run`, *optional*): A run to show beside it.
        card_template (`str` or `os.PathLike`): Template of the model card.
    """
    folder = Path(folder)
    run.save(folder)
    runs = [run] if baseline is None else [baseline, run]
    plot_loads(runs, folder / LOADS_NAME)
    plot_curves(runs, folder / CURVES_NAME)
    model_card(folder, run, baseline, card_template).save(folder / "README.md")


# ---------------------------------------------------------------------- pictures


def plot_loads(runs: list[Run], path: str | os.PathLike) -> None:
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
    figure.savefig(path, dpi=130)


def plot_curves(runs: list[Run], path: str | os.PathLike) -> None:
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
                panel.plot(*zip(*points), label=run.name, color=_COLOURS[run.name], marker=marker, markersize=4)
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
    figure.savefig(path, dpi=130)


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


def model_card(folder: str | os.PathLike, run: Run, baseline: Run | None, template: str | os.PathLike) -> Any:
    """The model card of a run, a [`~huggingface_hub.ModelCard`]; it says only what was measured."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    summary = run.summary
    title, dataset, base_model = Path(folder).name, summary["dataset"], summary["base_model"]
    if base_model is not None and Path(base_model).exists():  # a folder is no name on the Hub
        base_model = None
    hub_name = None if dataset == "toy" or Path(dataset).exists() else dataset
    dataset_text = hub_name or ("generated GSM8K-format problems" if dataset == "toy" else Path(dataset).name)
    result = EvalResult(
        task_type="text-generation",
        task_name="Math word problems",
        dataset_type=hub_name or ("generated" if dataset == "toy" else "local"),
        dataset_name=dataset_text,
        dataset_split="test",
        metric_type="exact_match",
        metric_name="exact match (strict match, no examples, greedy)",
        metric_value=round(summary["exact_match"]["trained"], 4),
    )
    data = ModelCardData(
        model_name=title,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        language="en",
        tags=["mixture-of-experts", "phi-balancing", summary["model_type"]],
        datasets=[hub_name] if hub_name else None,
        eval_results=[result],
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        title=title,
        summary=summary,
        base_name=base_model or (summary["base_model"] and Path(summary["base_model"]).name),
        dataset_text=dataset_text,
        columns=[run.name] if baseline is None else [baseline.name, run.name],
        rows=summary_rows(run, baseline),
        has_bias=bool(summary["balance"] and summary["balance"]["bias_coef"]),
        prompt=summary["example_prompt"],
        loads_picture=LOADS_NAME,
        curves_picture=CURVES_NAME,
    )


def summary_rows(run: Run, baseline: Run | None = None) -> list[list[str]]:
    """The figures of a run, beside those of `baseline` if there is one: rows of a name and one text per run."""
    summaries = [run.summary] if baseline is None else [baseline.summary, run.summary]
    rows: list[list[str]] = []
    for label, keys, form in (
        ("exact match, untrained", ("exact_match", "untrained"), "{:.1%}"),
        ("exact match, trained", ("exact_match", "trained"), "{:.1%}"),
        ("MaxVio per step, first tenth of training", ("max_vio", "start"), "{:.3f}"),
        ("MaxVio per step, last tenth of training", ("max_vio", "end"), "{:.3f}"),
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


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last(points: list[tuple[int, float]]) -> float | None:
    return points[-1][1] if points else None
