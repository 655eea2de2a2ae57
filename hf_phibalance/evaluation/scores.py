"""The functions that the task files in `tasks/` name: each scores the completions of one problem by our metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import GSM8KAccuracy, HumanEvalPassAtK


def gsm8k(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns `strict_match` and `flexible_extract` of an answer to a GSM8K problem, each 0 or 1."""
    return GSM8KAccuracy().compute(predictions=results, references=[doc["answer"]])


def made_problems(problems: int = 256, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Returns generated problems as the splits `train`, for shots, and `test`."""
    from datasets import Dataset

    from ..tasks import make_splits

    splits = make_splits(256, 0, problems, seed)
    return {split: Dataset.from_list(splits[split]) for split in ("train", "test")}


def all_samples(resps: Sequence[list[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Keeps all samples of each problem. The harness would keep the first."""
    return list(resps)


def humaneval(
    doc: dict[str, Any],
    results: Sequence[list[str]],
    k: Sequence[int] = (1,),
    timeout: float = 3.0,
    unsafe: bool = False,
) -> dict[str, float]:
    """Returns `pass@k` of the samples of a HumanEval problem. It runs them: the harness has asked for permission."""
    options = {"k": list(k), "timeout": timeout, "unsafe": unsafe, "allow_code_execution": True}
    found = HumanEvalPassAtK().compute(predictions=results, references=[doc], **options)
    return {name: value for name, value in found.items() if name.startswith("pass@")}
