"""Answers that a model writes, and how many of them are right."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import nn

from hf_phibalance.evaluation import GSM8K_STOPS, extract_strict, normalise_answer, truncate
from hf_phibalance.evaluation.sandbox import run_program

from ..corpus import END_OF_TEXT
from .material import Encoded


MOST_NEW_TOKENS = {"answer": 110, "function": 40}
BATCH = 48


@torch.no_grad()
def score(model: nn.Module, task: Encoded, tokenizer) -> float:
    """Share of the graded exercises whose greedily written answer is right."""
    was_training = model.training
    model.eval()
    judge = {"answer": is_answer, "function": is_function}[task.grade]
    right = 0
    order = sorted(range(len(task.graded)), key=lambda index: len(task.graded[index][0]))
    for start in range(0, len(order), BATCH):
        some = [task.graded[index] for index in order[start : start + BATCH]]
        answers = write(model, [ids for ids, _ in some], tokenizer, MOST_NEW_TOKENS[task.grade])
        for (ids, reference), answer in zip(some, answers):
            right += judge(tokenizer.decode(ids), answer, reference)
    model.train(was_training)
    return right / len(task.graded)


def write(model: nn.Module, prompts: list[list[int]], tokenizer, most: int) -> list[str]:
    """What the model writes greedily behind each prompt, up to the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=most,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written[:, longest:].tolist()]


def is_answer(prompt: str, answer: str, reference: str) -> bool:
    """GSM8K's strict match."""
    return normalise_answer(extract_strict(truncate(answer, GSM8K_STOPS))) == normalise_answer(reference)


def is_function(prompt: str, answer: str, reference: str) -> bool:
    """Whether the function passes its checks, run apart with limits; a body ends where its indentation does."""
    body = "\n".join(itertools.takewhile(lambda line: not line or line[0] == " ", answer.split("\n")))
    name = prompt[len("def ") : prompt.index("(")]
    return _passes(f"{prompt}{body}\n", reference, name)


@lru_cache(maxsize=100_000)  # most bodies are written by many models
def _passes(program: str, checks: str, name: str) -> bool:
    try:
        compile(program, "candidate", "exec")
    except (SyntaxError, ValueError):
        return False
    return run_program(program, checks, entry_points=(name,), allow_code_execution=True).passed
