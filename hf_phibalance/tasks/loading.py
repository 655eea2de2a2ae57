"""Loads the rows of a task from JSON lines or the Hub, and turns them into datasets for TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils import logging

from .contamination import Fingerprints, fingerprints_of, shipped_fingerprints
from .table import MBPP_SPLITS, Row, Task, get_task


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)
SHOWN_BAD_ROWS = 5


def load_rows(
    task: str,
    source: str,
    split: str = "train",
    *,
    bad_rows: Literal["refuse", "skip"] = "refuse",
    limit: int | None = None,
) -> list[Row]:
    """
    Loads and checks the rows of a dataset.

    Drops rows that contain a test problem of GSM8K or HumanEval, with one warning. Keeps them in the `test` splits of
    these two. See `contamination.py` for what is recognised.

    Args:
        task (`str`): One of `TASKS`.
        source (`str`):
            A folder with `<split>.jsonl` (or `.jsonl.gz`) or the file that the dataset is published as (`mbpp.jsonl`,
            `HumanEval.jsonl.gz`); one `.jsonl` or `.jsonl.gz` file; or a dataset on the Hub, `name` or `name:config`.
            A file of MBPP is split by `task_id`. All rows of any other single file belong to the split.
        split (`str`, *optional*, defaults to `"train"`):
            MBPP has `"test"` (`task_id` 11 to 510), `"validation"` (511 to 600), `"train"` (601 to 974), `"prompt"`
            (1 to 10), and `"all"` (for training if you evaluate on another benchmark, for example HumanEval).
        bad_rows (`"refuse"` or `"skip"`, *optional*, defaults to `"refuse"`):
            Whether malformed rows raise an error, or are dropped with one warning that counts and shows them.
        limit (`int`, *optional*): Stops after this number of good rows.

    Returns:
        `list[dict]`: The rows, as they are in the source.

    Raises:
        `FileNotFoundError`: If there is no such file or folder.
        `ValueError`: If an argument is invalid, nothing is left, or a row is malformed and `bad_rows="refuse"`.
    """
    kind = get_task(task)
    if split not in kind.splits:
        hint = " It is for evaluation only, nothing of it may be trained on." if not kind.trains else ""
        raise ValueError(f"split={split!r}: {task} has {', '.join(kind.splits)}.{hint}")
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows={bad_rows!r}: use 'refuse' or 'skip'.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use a positive number, or None for all rows.")

    is_hub = _is_hub(source)
    guard = None if split == "test" and task in ("gsm8k", "humaneval") else _guard(kind, source, is_hub)
    ids = MBPP_SPLITS[split] if task == "mbpp" and split != "all" and not is_hub else None
    rows: list[Row] = []
    bad: list[str] = []
    contaminated: list[str] = []
    seen = 0
    for place, row in _read_hub(kind, source, split) if is_hub else _read_lines(_find_file(kind, source, split)):
        seen += 1
        if isinstance(row, str):
            bad.append(f"{place}: {row}")
        elif (problem := kind.find_problem(row)) is not None:
            bad.append(f"{place}: {problem}")
        elif ids is not None and row["task_id"] not in ids:
            continue
        elif guard is not None and (found := guard.find(row)) is not None:
            contaminated.append(f"{place} ({found})")
        else:
            rows.append(row)
            if len(rows) == limit:
                break

    if bad and bad_rows == "refuse":
        raise ValueError(
            f"{source}: {len(bad)} of {seen} rows cannot be used for {task}:\n{_shown(bad)}\nCorrect them, or leave them "
            "out with bad_rows='skip'."
        )
    if bad:
        logger.warning(f"{source}: skipped {len(bad)} of {seen} rows that cannot be used for {task}:\n{_shown(bad)}")
    if contaminated:
        logger.warning(
            f"{source}: left out {len(contaminated)} of {seen} rows that hold a test problem of the named benchmark:\n"
            f"{_shown(contaminated)}"
        )
    if not rows:
        hint = (
            " Is it the right file? MBPP is divided by task_id; split='all' takes every row." if task == "mbpp" else ""
        )
        raise ValueError(f"{source}: nothing is left of the {seen} rows for split {split!r} of {task}.{hint}")
    return rows


def _shown(items: Sequence[str]) -> str:
    more = [f"... and {len(items) - SHOWN_BAD_ROWS} more"] if len(items) > SHOWN_BAD_ROWS else []
    return "\n".join(f"  {item}" for item in [*items[:SHOWN_BAD_ROWS], *more])


def _guard(task: Task, source: str, is_hub: bool) -> Fingerprints:
    """Returns the shipped fingerprints and, for GSM8K, those of the test problems beside the rows or on the Hub."""
    if task.name != "gsm8k":
        return shipped_fingerprints()
    problems: list[Any] = []
    if is_hub:
        try:
            problems = [row for _, row in _read_hub(task, task.hub_name, "test")]
        except ValueError as error:
            logger.warning(f"Training rows are checked by the shipped fingerprints only: {error}")
    for name in ("test.jsonl", "test.jsonl.gz"):
        if not problems and (file := Path(source) / name).is_file():
            problems = [row for _, row in _read_lines(file)]
    guard = copy.deepcopy(shipped_fingerprints())
    good = [row for row in problems if not isinstance(row, str) and task.find_problem(row) is None]
    for entry in fingerprints_of("gsm8k", good):
        guard.add("gsm8k", *entry)
    return guard


# ---------------------------------------------------------------------- reading


def _is_hub(source: str) -> bool:
    """Returns whether `source` names a dataset on the Hub. Raises if it looks like a path that does not exist."""
    if Path(source).exists():
        return False
    name = source.partition(":")[0]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or re.search(r"\.(jsonl|gz|json)$", name):
        raise FileNotFoundError(f"{source!r} does not exist: give a folder, a .jsonl file or a dataset on the Hub.")
    return True


def _find_file(task: Task, source: str, split: str) -> Path:
    path = Path(source)
    if not path.is_dir():
        return path
    names = [f"{split}.jsonl", f"{split}.jsonl.gz", *task.files]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{source!r} holds none of {', '.join(names)}: give a folder that does, or the file itself."
    )


def _read_hub(task: Task, source: str, split: str) -> Iterator[tuple[str, Row | str]]:
    """Yields `("row <number>", row)` of every row."""
    from datasets import load_dataset

    name, _, own_config = source.partition(":")
    config = own_config or (task.hub_config if name == task.hub_name else None)
    parts = "prompt+test+validation+train" if split == "all" else split
    try:
        table = load_dataset(name, config, split=parts)
    except Exception as error:
        raise ValueError(
            f"{source!r} is no local file or folder, and split {split!r} of it could not be loaded from the Hub "
            f"({type(error).__name__}: {error}). Correct the name, or give a path."
        ) from error
    for number, row in enumerate(table):
        yield f"row {number}", dict(row)


def _read_lines(path: Path) -> Iterator[tuple[str, Row | str]]:
    """Yields (place, row) of every line, or (place, what is wrong with it)."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8
                    row = f"it is not JSON: {error}"
                else:
                    row = row if isinstance(row, dict) else "it is not a JSON object"
                yield f"{path.name}, line {number}", row
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read beyond line {number}: {error}. Get the file anew.") from error


# ---------------------------------------------------------------------- datasets for TRL


def to_sft_dataset(task: str, rows: Iterable[Row], tokenizer: Any = None) -> Dataset:
    """
    Makes a dataset with the columns `prompt` and `completion`. TRL trains only on the completion.

    Some tokenizers merge the end of a prompt with the start of its completion (GPT-2's, for example, a line break with
    the indentation after it). TRL would then train on tokens that never occur in generation. For such a tokenizer,
    prompt and completion are also tokenized separately, as the columns `input_ids` and `completion_mask`.

    Args:
        task (`str`): One of `TASKS`.
        rows (`Iterable[dict]`): Rows from `load_rows`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            If it has a chat template, prompt and completion are messages of the user and of the assistant. The template
            is not used if it changes the completion (some strip the indentation of code), or if the tokenizer merges
            the end of the prompt with the start of the completion.

    Returns:
        `datasets.Dataset`: One row for each of `rows`.

    Raises:
        `ValueError`: If there are no rows, or the task is for evaluation only.
    """
    from datasets import Dataset

    kind = get_task(task)
    if not kind.trains:
        raise ValueError(f"{task} is for evaluation only: train on mbpp instead.")
    pairs = [(kind.prompt(row), kind.completion(row)) for row in rows]
    if not pairs:
        raise ValueError(f"no rows of {task} to make a dataset of: load some first.")
    if getattr(tokenizer, "chat_template", None):
        chats = [_chat(*pair) for pair in pairs]
        if all(_survives(tokenizer, chat) for chat in chats[:8]):
            return Dataset.from_list(chats)
        logger.warning(
            f"The chat template changes the completions of {task}, or the tokenizer merges their start with it: plain text "
            "is trained on instead."
        )
    texts: list[dict[str, Any]] = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
    if tokenizer is not None and any(_merges(tokenizer, *pair) for pair in pairs[:8]):
        texts = [{**row, **_tokens(tokenizer, *pair)} for row, pair in zip(texts, pairs)]
    return Dataset.from_list(texts)


def _chat(prompt: str, text: str) -> dict[str, list[dict[str, str]]]:
    # a single space only joins the completion to the prompt
    text = text if text.startswith("  ") else text.removeprefix(" ")
    return {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": text}]}


def _survives(tokenizer: Any, chat: dict[str, list[dict[str, str]]]) -> bool:
    """
    Returns whether the chat template keeps the completion, except for white space at its end, and its first token does
    not merge with the end of the prompt.
    """
    prompt = tokenizer.apply_chat_template(chat["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*chat["prompt"], *chat["completion"]], tokenize=False)
    is_kept = chat["completion"][0]["content"].rstrip() in whole
    return is_kept and not _merges(tokenizer, prompt, whole.removeprefix(prompt))


def _merges(tokenizer: Any, prompt: str, text: str) -> bool:
    """Returns whether the tokens of a prompt change when its completion follows."""
    alone = tokenizer(prompt)["input_ids"]
    return tokenizer(prompt + text)["input_ids"][: len(alone)] != alone


def _tokens(tokenizer: Any, prompt: str, text: str) -> dict[str, list[int]]:
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": before + after, "completion_mask": [0] * len(before) + [1] * len(after)}
