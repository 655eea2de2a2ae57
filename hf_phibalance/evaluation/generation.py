"""
Completions of prompts by a model, in batches that an interruption does not change: each has its own seed.

Prompts are lists of token ids here, as `tokenize_prompts` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .completions import CompletionStore
from .scoring import truncate


@dataclass(frozen=True)
class Decoding:
    """
    How a completion is decoded, and where it ends.

    Args:
        max_new_tokens (`int`): Its greatest length.
        stops (`Sequence[str]`): It ends before the first of these texts.
        temperature (`float`, *optional*, defaults to `0.0`): Of the sampling; 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus of the sampling.
    """

    max_new_tokens: int
    stops: Sequence[str]
    temperature: float = 0.0
    top_p: float = 1.0

    def generation_config(self, model: Any) -> GenerationConfig:
        """This for `generate`, with the special tokens of the model."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            **(sampling if self.temperature > 0 else {"do_sample": False}),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=model.generation_config.pad_token_id,
        )


class StopAtText(StoppingCriteria):
    """
    Ends a row whose completion holds a stop text; the prompt does not count, unlike in `stop_strings=`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the model.
        stops (`Sequence[str]`): The stop texts.
        prompt_length (`int`): Tokens of the padded prompts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
        self.tail = max(map(len, stops)) + 1  # tokens; each writes at least one character of a stop text

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        tails = input_ids[:, self.prompt_length :][:, -self.tail :]
        ends = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        found = [any(stop in end for stop in self.stops) for end in ends]
        return torch.tensor(found, device=input_ids.device)


def reset_generation_config(model: Any, tokenizer: Any) -> None:
    """Leaves nothing of its own in how a model generates but the tokens that end a completion, those of both."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends - {None}) or None, pad_token_id=tokenizer.pad_token_id
    )


def tokenize_prompts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_new_tokens: int,
    *,
    add_special_tokens: bool = True,
    long_prompts: str = "refuse",
) -> tuple[list[list[int]], int]:
    """
    Token ids of prompts that leave room for a completion in the context of the model.

    Args:
        model ([`~transformers.PreTrainedModel`]): Its config says how long the context is, or nothing.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the model.
        texts (`Sequence[str]`): The prompts.
        max_new_tokens (`int`): Room for the completion.
        add_special_tokens (`bool`, *optional*, defaults to `True`): `False` if the texts hold them already.
        long_prompts (`str`, *optional*, defaults to `"refuse"`):
            What becomes of prompts that are too long: `"refuse"`, or `"truncate"` on the left.

    Returns:
        `tuple[list[list[int]], int]`: The ids, and how many prompts were cut.

    Raises:
        `ValueError`: If a prompt is empty, or too long and not to be cut, or if there is no room for any.
    """
    ids = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    if empty := [index for index, own in enumerate(ids) if not own]:
        raise ValueError(f"the prompts of {len(empty)} problems are empty, the first is problem {empty[0]}.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return ids, 0
    room = context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the model's context is {context} tokens, which leaves nothing for "
            "the prompt. Lower it."
        )
    long = [len(own) for own in ids if len(own) > room]
    if long and long_prompts == "refuse":
        raise ValueError(
            f"{len(long)} of {len(ids)} prompts, the longest of {max(long)} tokens, and max_new_tokens="
            f"{max_new_tokens} exceed the model's context of {context} tokens. Lower max_new_tokens or "
            "num_fewshot, or cut the prompts on the left with --long_prompts truncate."
        )
    return [own[-room:] for own in ids], len(long)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, seed: int
) -> Iterator[tuple[str, int, str]]:
    """
    Completions of one batch of prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]): In eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the model, with a padding token.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        decoding ([`Decoding`]): How to decode.
        seed (`int`): Seed of the sampling.

    Yields:
        `tuple[str, int, str]`: Text, number of tokens, and how it ended: `"eos"`, `"stop"` or `"length"`.
    """
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    config = decoding.generation_config(model)
    torch.manual_seed(seed)
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=torch.tensor(padded).to(model.device),
            attention_mask=torch.tensor(mask).to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([StopAtText(tokenizer, decoding.stops, longest)]),
        )
    ends = set(config.eos_token_id or [])
    for ids in tokens[:, longest:].tolist():
        own = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
        whole = tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = truncate(whole, decoding.stops)
        if text == whole and len(own) < len(ids):
            ended = "eos"
        else:
            ended = "length" if text == whole and len(ids) == decoding.max_new_tokens else "stop"
        yield text, sum(token != tokenizer.pad_token_id for token in own), ended


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    store: CompletionStore,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """
    Fills `store` with the completions that it lacks.

    The batches are the same whether or not some are there already, and each has its seed: what an interrupted run
    and its resumption give together is what one run gives.

    Args:
        model ([`~transformers.PreTrainedModel`]): In eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the model, with a padding token.
        prompts (`Sequence[Sequence[int]]`): Token ids of all prompts.
        decoding ([`Decoding`]): How to decode.
        store ([`CompletionStore`]): What there is already, and what is added.
        num_samples (`int`, *optional*, defaults to `1`): Completions of each prompt.
        batch_size (`int`, *optional*, defaults to `16`): Completions generated at a time.
        seed (`int`, *optional*, defaults to `0`): Seed of the first batch.
    """
    requests = [(index, sample) for index in range(len(prompts)) for sample in range(num_samples)]
    order = sorted(requests, key=lambda request: (-len(prompts[request[0]]), request))  # the longest first, together
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    done = sum(len(batch) for number, batch in enumerate(batches) if number in store.batches)
    with tqdm(total=len(order), initial=done, desc="Completions", unit="") as bar:
        for number, batch in enumerate(batches):
            if number in store.batches:
                continue
            outcomes = generate(model, tokenizer, [prompts[index] for index, _ in batch], decoding, seed + number)
            store.add(
                number,
                [
                    {"index": index, "sample": sample, "completion": text, "tokens": tokens, "ended": ended}
                    for (index, sample), (text, tokens, ended) in zip(batch, outcomes)
                ],
            )
            bar.update(len(batch))
