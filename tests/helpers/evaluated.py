"""
What the tests of evaluations examine: a problem in HumanEval's form, a tiny model with a selection bias, and a stand-in
for a model that answers as planned.
"""

from types import SimpleNamespace

import torch
from transformers import GenerationConfig

import hf_phibalance as phb
from hf_phibalance.models import build_model, train_tokenizer
from hf_phibalance.tasks import make_splits


ADD_ONE = {
    "task_id": "test/0",
    "prompt": "def add_one(x):\n",
    "entry_point": "add_one",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n",
}
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "experts_implementation": "eager",
}


def biased_mixtral():
    """`(model, tokenizer)`: a tiny random Mixtral, patched, whose selection bias prefers its first expert."""
    rows = make_splits(300, 0, 20)
    tokenizer = train_tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows["train"])
    torch.manual_seed(0)
    model = phb.patch(build_model("mixtral", FIELDS, tokenizer), {"coef": 0.0, "bias_coef": 0.01})
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: torch.tensor([0.5, 0.0, 0.0, -0.5]) for name in balancer.layer_names})
    return model, tokenizer


class Scripted:
    """Stands for a model that continues a prompt with `answers[prompt]`, token by token, until it is stopped."""

    device, dtype, base_model = "cpu", torch.float32, None

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.steps = tokenizer, answers, 0
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
        self.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], pad_token_id=0)

    def num_parameters(self):
        return 0

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        prompts = [self.tokenizer.decode(row[mask == 1]) for row, mask in zip(input_ids, attention_mask)]
        planned = [self.tokenizer(self.answers[prompt])["input_ids"] for prompt in prompts]
        done = torch.zeros(len(planned), dtype=torch.bool)
        for step in range(generation_config.max_new_tokens):
            new = [0 if done[row] else (ids[step] if step < len(ids) else 1) for row, ids in enumerate(planned)]
            input_ids = torch.cat([input_ids, torch.tensor(new)[:, None]], dim=1)
            self.steps += int((~done).sum())
            done |= stopping_criteria(input_ids, None) | (torch.tensor(new) == 1)
            if done.all():
                break
        return input_ids
