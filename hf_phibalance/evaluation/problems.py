"""
The problems that a model is examined on: which there are, the prompts that put them, and the scores of what it wrote.

Shots and prompts are those of lm-evaluation-harness, to the letter.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..tasks import TASKS, load_rows, make_splits
from .scoring import HARNESS_FEWSHOT_SEED


TOY_PROBLEMS = 256
TOY_SHOT_POOL = 256

Row = dict[str, Any]


def load_problems(
    task: str,
    dataset_path: str | None = None,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    bad_rows: Literal["refuse", "skip"] = "refuse",
    problem_seed: int = 0,
) -> tuple[list[Row], list[Row]]:
    """
    Test rows, and the training rows of which shots are drawn.

    Args:
        task (`str`): `"gsm8k"` or `"humaneval"`.
        dataset_path (`str`, *optional*):
            Folder, file or name on the Hub, by default that of the task, or `"toy"` for made problems in the form of
            GSM8K.
        num_fewshot (`int`, *optional*, defaults to `0`): Shots before each problem; without them, no rows are read.
        limit (`int`, *optional*): Only the first so many problems.
        bad_rows (`str`, *optional*, defaults to `"refuse"`): What to do with malformed rows, `"refuse"` or `"skip"`.
        problem_seed (`int`, *optional*, defaults to `0`): Seed of the made problems.

    Returns:
        `tuple[list[dict], list[dict]]`: The problems, and the rows for the shots.

    Raises:
        `ValueError`: If there are too few training rows, or none can be there.
    """
    if dataset_path == "toy":
        pool = max(TOY_SHOT_POOL, num_fewshot) if num_fewshot else 0
        splits = make_splits(pool, 0, limit or TOY_PROBLEMS, problem_seed)
        return splits["test"], splits["train"]
    source = dataset_path or TASKS[task].hub_name
    problems = load_rows(task, source, "test", bad_rows=bad_rows, limit=limit)
    shots: list[Row] = []
    if num_fewshot:
        if Path(source).is_file():
            raise ValueError(
                f"dataset_path={source!r} is one file, which has no training rows to draw shots from: give the folder "
                "with train.jsonl and test.jsonl, or num_fewshot=0."
            )
        shots = load_rows(task, source, "train", bad_rows=bad_rows)
        if len(shots) < num_fewshot:
            raise ValueError(f"num_fewshot={num_fewshot}: there are only {len(shots)} training rows.")
    return problems, shots


def make_prompts(
    task: str,
    problems: Iterable[Row],
    shots: Sequence[Row] = (),
    num_fewshot: int = 0,
    seed: int = HARNESS_FEWSHOT_SEED,
) -> list[str]:
    """
    The texts that are put to the model, in the order of the problems.

    Args:
        task (`str`): `"gsm8k"` or `"humaneval"`.
        problems (`Iterable[dict]`): Test rows.
        shots (`Sequence[dict]`, *optional*): Training rows to draw from.
        num_fewshot (`int`, *optional*, defaults to `0`): How many are drawn for each problem.
        seed (`int`, *optional*, defaults to `1234`): Seed of the draw, by default the harness's.
    """
    form = TASKS[task]
    draw = random.Random(seed)  # each problem has shots of its own, drawn as the harness does
    texts = []
    for problem in problems:
        drawn = draw.sample(shots, num_fewshot) if num_fewshot else []
        examples = [f"{form.prompt(row)}{form.completion(row)}\n\n" for row in drawn]
        texts.append("".join(examples) + form.prompt(problem))
    return texts


def as_chats(texts: Iterable[str], tokenizer: Any) -> list[str]:
    """Prompts as a user's messages, in the chat template of the tokenizer, which adds the special tokens as well."""
    if not tokenizer.chat_template:
        raise ValueError(f"apply_chat_template=True, but the tokenizer of {tokenizer.name_or_path} has none.")
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def score_completions(
    task: str,
    problems: Sequence[Row],
    completions: Sequence[Mapping[str, Any]],
    *,
    k: Sequence[int] = (1,),
    timeout: float = 3.0,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """
    Scores what the model wrote. For HumanEval this runs it: the caller has asked for permission.

    Args:
        task (`str`): `"gsm8k"` or `"humaneval"`.
        problems (`Sequence[dict]`): Test rows.
        completions (`Sequence[dict]`):
            At least `index`, the number of the problem, and `completion`; in the order of the problems, as many for
            each.
        k (`Sequence[int]`, *optional*, defaults to `(1,)`): Which pass@k of HumanEval to report.
        timeout (`float`, *optional*, defaults to `3.0`): Seconds for each program.

    Returns:
        `tuple[dict[str, float], list[dict]]`: The scores by name, and the completions, each with the `id` of its
        problem and its verdict.
    """
    texts = [entry["completion"] for entry in completions]
    if task == "gsm8k":
        ids: Sequence[Any] = range(len(problems))
        references = [problems[entry["index"]]["answer"] for entry in completions]
        scores, verdicts = _exact_match(texts, references)
    else:
        ids = [problem["task_id"] for problem in problems]
        scores, verdicts = _pass_at_k(texts, problems, k, timeout)
    entries = [{"id": ids[entry["index"]], **entry, **verdict} for entry, verdict in zip(completions, verdicts)]
    return {name: float(value) for name, value in scores.items()}, entries


def _exact_match(texts: list[str], references: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from . import GSM8KAccuracy

    scores = GSM8KAccuracy().compute(predictions=texts, references=references, details=True)
    return scores, scores.pop("results")


def _pass_at_k(
    texts: list[str], problems: Sequence[Row], k: Sequence[int], timeout: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from tqdm.auto import tqdm

    from . import HumanEvalPassAtK

    samples = len(texts) // len(problems)
    with tqdm(total=len(texts), desc="Programs", unit="") as bar:
        scores = HumanEvalPassAtK().compute(
            predictions=[texts[at : at + samples] for at in range(0, len(texts), samples)],
            references=problems,
            k=k,
            timeout=timeout,
            allow_code_execution=True,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    return scores, [verdict for own in scores.pop("results") for verdict in own]
