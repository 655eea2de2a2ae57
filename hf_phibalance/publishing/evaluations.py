"""What is said of a run's evaluations: in words on its card, in the card's model-index, and in `.eval_results`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reporting import is_absolute, without_paths
from .run import Run


EVAL_RESULTS_FOLDER = ".eval_results"
# settings of an evaluation that a card says elsewhere, or that mean nothing to a reader
UNINTERESTING = ("task", "problems", "prompts", "model", "model_name_or_path", "revision", "dataset_path")


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
        and not is_absolute(value)
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


def model_index(run: Run, hub_dataset: str | None, dataset_text: str | None) -> list[Any]:
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


def _settings(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = evaluation.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _task(evaluation: Mapping[str, Any]) -> str:
    """Name of the task, from the file's if the result does not say it."""
    task = evaluation.get("task") or _settings(evaluation).get("task") or Path(evaluation["file"]).stem[len("eval-") :]
    return f"generated {task} problems" if _settings(evaluation).get("dataset_path") == "toy" else str(task)


def _benchmark(evaluation: Mapping[str, Any]) -> Benchmark | None:
    return BENCHMARKS.get(_task(evaluation).lower())


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
