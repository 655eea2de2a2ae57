"""The expert load of an evaluation: how evenly prompts and completions are spread over the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..balancing import find_balancer, get_balancer, patch
from ..config import PhiBalanceConfig


def count_loads(model: Any) -> None:
    """
    Lets the routers of a model count their loads, and changes nothing else; one that is patched does so already.

    Raises:
        `ValueError`: If the model has no routers.
    """
    if find_balancer(model) is None:
        patch(model, PhiBalanceConfig(coef=0.0, bias_coef=0.0))


def expert_load(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
) -> dict[str, float]:
    """
    Balance over the tokens of all prompts and completions.

    Generation is not counted, so the texts are read once more, by the backbone only.

    Args:
        model ([`~transformers.PreTrainedModel`]): Patched, see `count_loads`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the model.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        completions (`Sequence[dict]`): `index`, the number of the prompt, and `completion`, the text.
        batch_size (`int`, *optional*, defaults to `16`): Texts read at a time.

    Returns:
        `dict[str, float]`: The metrics of [`PhiBalancer.eval_metrics`].
    """
    own = [tokenizer(entry["completion"], add_special_tokens=False)["input_ids"] for entry in completions]
    texts = [[*prompts[entry["index"]], *ids] for entry, ids in zip(completions, own)]
    texts.sort(key=len, reverse=True)
    balancer = get_balancer(model)
    with balancer.evaluation(), torch.inference_mode():
        for at in tqdm(range(0, len(texts), batch_size), desc="Expert load", unit="batch"):
            rows = [torch.tensor(text) for text in texts[at : at + batch_size]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            lengths = torch.tensor([[len(row)] for row in rows])
            mask = (torch.arange(tokens.shape[1]) < lengths).long().to(model.device)
            tokens = tokens.to(model.device)
            with balancer.forwards.labels_of(
                tokens.masked_fill(mask == 0, -100)
            ):  # for token_mask="labels": count all
                model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return balancer.eval_metrics(per_layer=0)
