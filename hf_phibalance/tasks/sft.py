"""Rows for the trainer: the prompts and completions of which TRL's `SFTTrainer` trains the completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .table import Row, get_task


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)


def to_sft_dataset(task: str, rows: Iterable[Row], tokenizer: Any = None) -> Dataset:
    """
    Rows as a dataset with the columns `prompt` and `completion`, of which TRL trains the completion only.

    A tokenizer may merge the end of a prompt with the start of its completion (in GPT-2's way of splitting, a line break
    with the indentation after it). TRL would then train on another context than the one that generation starts from. So
    with such a tokenizer the rows come tokenized as well, prompt and completion on their own, as `input_ids` and
    `completion_mask`.

    Args:
        task (`str`): one of `TASKS`.
        rows (`Iterable[dict]`): what `load_rows` returned.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            If it has a chat template, prompt and completion are messages of the user and of the assistant. A template
            that changes the completion (some strip its first spaces, which are the indentation of code) is not used.

    Returns:
        `datasets.Dataset`: one row per row.

    Raises:
        ValueError: if there are no rows, or the task is for evaluation only.
    """
    from datasets import Dataset

    kind = get_task(task)
    if not kind.trains:
        raise ValueError(f"{task} is for evaluation only: train on mbpp instead.")
    pairs = [(kind.prompt(row), kind.completion(row)) for row in rows]
    if not pairs:
        raise ValueError(f"no rows of {task} to make a dataset of: load some first.")
    if getattr(tokenizer, "chat_template", None):
        # a space that only joins the completion to the prompt is not part of a message
        chats = [(prompt, text if text.startswith("  ") else text.removeprefix(" ")) for prompt, text in pairs]
        if all(_survives(tokenizer, *chat) for chat in chats[:8]):
            return Dataset.from_list(
                [
                    {
                        "prompt": [{"role": "user", "content": prompt}],
                        "completion": [{"role": "assistant", "content": text}],
                    }
                    for prompt, text in chats
                ]
            )
        logger.warning(f"The chat template changes the completions of {task}: plain text is trained on instead.")
    texts = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
    if tokenizer is not None and any(_merges(tokenizer, *pair) for pair in pairs[:8]):
        return Dataset.from_list([{**row, **_tokens(tokenizer, *pair)} for row, pair in zip(texts, pairs)])
    return Dataset.from_list(texts)


def _merges(tokenizer: Any, prompt: str, text: str) -> bool:
    """Whether the tokens of a prompt change when its completion follows."""
    alone = tokenizer(prompt)["input_ids"]
    return tokenizer(prompt + text)["input_ids"][: len(alone)] != alone


def _tokens(tokenizer: Any, prompt: str, text: str) -> dict[str, list[int]]:
    """What TRL makes of a row, but for where the completion starts."""
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": before + after, "completion_mask": [0] * len(before) + [1] * len(after)}


def _survives(tokenizer: Any, prompt: str, text: str) -> bool:
    """Whether a chat template renders a completion as it is, but for white space at its end."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return text.rstrip() in tokenizer.apply_chat_template(messages, tokenize=False)
