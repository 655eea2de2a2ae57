"""Writes the model card of a run, a section about expert balance for `Trainer`'s card, and the results folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import hub_name, public_name
from ..maths import METHODS
from ..models import HEADS, IMAGE_CLASS, TEXT_CLASS
from .pictures import CURVES_NAME, LOADS_NAME, draw, pictures_in
from .run import BASELINE_FOLDERS, PER_LAYER, SUMMARY_NAME, Run, Score


CARD_NAME = "README.md"
CARD_MARK = "<!-- hf_phibalance -->"  # marks the cards of our template
FIGURES = (
    ("MaxVio", "moe/max_vio", ".3f"),
    ("Gini", "moe/gini", ".3f"),
    ("dead experts", "moe/dead_experts", ".0f"),
    ("loss", "loss", ".4f"),
)


def as_code(text: object) -> str:
    """
    Returns a text as a Markdown code span, in which Markdown and HTML have no effect. All text from outside enters a
    card through this function.
    """
    line = " ".join(str(text).split()).replace("|", "¦")  # a bar would end a cell, even in a code span
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line or '?'}`"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, or nothing if there are no rows."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def model_card(
    run: Run,
    baseline: Run | None = None,
    *,
    title: str,
    base_model: str | None = None,
    library_name: str = "transformers",
    repo_id: str | None = None,
    pictures: Sequence[str] = (LOADS_NAME, CURVES_NAME),
) -> ModelCard:
    """
    Makes the model card of a run. The card says only what the run measured.

    Args:
        run (`Run`): the run.
        baseline (`Run`, *optional*): a run to compare with.
        title (`str`): name of the model.
        base_model (`str`, *optional*): the fine-tuned model, if it is not the run's `base_model`.
        library_name (`str`, *optional*, defaults to `"transformers"`): `"peft"` for an adapter.
        repo_id (`str`, *optional*): repository of the model on the Hub.
        pictures (`Sequence[str]`, *optional*): pictures next to the card.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    base_model, dataset = base_model or run.base_model, hub_name(run.dataset)
    scores = [score for found in run.evaluations.values() for score in found]
    results = [_eval_result(score) for score in (*_own_score(run), *scores) if "expert_load" not in score.metric]
    data = ModelCardData(
        model_name=title if results else None,
        base_model=hub_name(base_model),
        library_name=library_name,
        pipeline_tag=HEADS[run.auto_class][0],
        tags=tags(run),
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        code=as_code,
        run=run,
        title=title,
        base=base_model and public_name(base_model),
        base_is_on_hub=data.base_model is not None,
        generates=run.auto_class in (TEXT_CLASS, IMAGE_CLASS),
        is_adapter=library_name == "peft",
        is_generated=run.dataset == "toy",
        results=_results(run, baseline),
        balance=balance_section(run, baseline),
        scores=scores,
        pictures=pictures,
        repo_id=repo_id or "path/to/this/folder",
        mark=CARD_MARK,
    )


def balance_section(run: Run, baseline: Run | None = None) -> str:
    """Returns the section of a card about expert balance, as Markdown."""
    counted = "The load of the experts was counted"
    parts = ["## Expert balance", f"{counted}." if run.own_bias else f"{counted}, and nothing was balanced."]
    if run.balance is not None:
        method = f"routers balanced by the method `{run.balance.method}` ({METHODS[run.balance.method].source})"
        phi = "φ-balanced routers ([arXiv 2605.15403](https://arxiv.org/abs/2605.15403))"
        fields = {key: value for key, value in run.balance.to_dict().items() if key != "version" and value != {}}
        settings = ", ".join(as_code(f"{key}={value}") for key, value in fields.items())
        parts[1] = f"Trained with {phi if run.balance.method == 'phi' else method}: {settings}."
    if run.own_bias and not (run.balance and run.balance.bias_coef):
        parts[1] += " The selection bias of an earlier training was in force, and did not move."
    columns = {name: _layers(figures) for name, figures in run.measured().items()}
    if baseline is not None:
        columns[f"{baseline.name} run, after"] = _layers(baseline.held_out)
    columns = {name: column for name, column in columns.items() if column}
    layers = dict.fromkeys(layer for column in columns.values() for layer in column)
    rows = [[as_code(layer), *(_number(column.get(layer), ".3f") for column in columns.values())] for layer in layers]
    if rows:
        parts.append("MaxVio is (greatest load of an expert − mean load) / mean load: 0 is perfect balance.")
        if floor := run.series("moe/noise_floor"):
            parts[-1] += f" A training step has so few tokens that chance alone gives about {floor[-1][1]:.2f}."
        parts.append(markdown_table(["MaxVio of", *columns], rows))
    return "\n\n".join(parts) + "\n"


def tags(run: Run) -> list[str]:
    """Returns the Hub's tags of a run's model."""
    is_phi = run.balance is None or run.balance.method == "phi"
    return ["mixture-of-experts", *(["phi-balancing"] if is_phi else []), run.model_type]


def write_report(folder: str | os.PathLike, run: Run, baseline: Run | None, dpi: int = 130) -> None:
    """
    Writes figures, pictures and the model card of a run into its results folder. Also saves `baseline`, a run to
    compare with, so that the card can be made again. Renames the figures of another baseline to
    `earlier_metrics.json`.
    """
    folder = Path(folder)
    run.save(folder)
    saved = [folder / name / SUMMARY_NAME for name in BASELINE_FOLDERS]
    for path in saved:
        if path.exists() and (baseline is None or path.read_text() != baseline.summary()):
            path.replace(path.with_name(f"earlier_{SUMMARY_NAME}"))  # not deleted: a model may lie beside it
    if baseline is not None and not any(path.exists() for path in saved):
        baseline.save(folder / BASELINE_FOLDERS[-1])
    draw(folder, run, baseline, dpi)
    model_card(run, baseline, title=folder.name, pictures=pictures_in(folder)).save(folder / CARD_NAME)


def print_summary(folder: str | os.PathLike, run: Run, baseline: Run | None, seconds: float) -> None:
    """Prints a table of the figures, and where the results are."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    heading = f"**{run.model_type}, {run.parameters / 1e6:.2f} M parameters**"
    console.print(Markdown(f"{heading}\n\n{_results(run, baseline)}"))
    console.print(f"Results in {folder} after {seconds:.0f} s: model, {SUMMARY_NAME}, {LOADS_NAME}, {CURVES_NAME}")


def _results(run: Run, baseline: Run | None) -> str:
    """Returns a Markdown table of the figures of a run, and of `baseline` if there is one."""
    runs, rows = [run] if baseline is None else [baseline, run], []

    def add(label: str, form: str, values: list[float | None]) -> None:
        if any(value is not None for value in values):
            rows.append([label, *(_number(value, form) for value in values)])

    for when in ("untrained", "trained"):
        add(f"exact match, {when}", ".1%", [one.exact_match.get(when) for one in runs])
    for when in run.measured():
        for name, key, form in FIGURES if "held-out" in when else FIGURES[:1]:
            add(f"{name}, {when}", form, [one.measured()[when].get(key) for one in runs])
    return markdown_table(["", *(one.name for one in runs)], rows)


def _own_score(run: Run) -> list[Score]:
    """Returns the exact match that the training recipe measured, or `[]`."""
    value = run.exact_match.get("trained")
    if value is None:
        return []
    name = "generated problems" if run.dataset == "toy" else str(run.dataset)
    count = run.problems.get("test")
    return [Score(name, "exact_match,strict-match", value, shots=0, problems=count, dataset=run.dataset)]


def _eval_result(score: Score) -> EvalResult:
    """Returns the entry of the card's model-index for a score."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=hub_name(score.dataset) or score.task,
        dataset_name=score.task,
        metric_type=score.metric.partition(",")[0],
        metric_name=f"{score.metric} ({score.shots} shots, {score.count} problems)",
        metric_value=round(score.value, 4),
    )


def _layers(figures: Mapping[str, float]) -> dict[str, float]:
    """Returns the MaxVio of each layer."""
    return {key.removeprefix(PER_LAYER): value for key, value in figures.items() if key.startswith(PER_LAYER)}


def _number(value: float | None, form: str) -> str:
    """Returns a figure as text, or a dash if it was not measured."""
    return "–" if value is None else format(value, form)
