"""Which experts tiny models choose, written down naively from the logits that transformers records."""

import math

import torch


def softmax_choice(logits, gate):
    return torch.softmax(logits.float(), -1).topk(2, -1).indices


def logits_choice(logits, gate):
    return logits.topk(2, -1).indices


def grouped_choice(logits, gate):
    """DeepSeek-V3: sigmoid scores plus bias, the two best of four groups by the sum of their two best, top-2 in those."""
    scores = torch.sigmoid(logits.float()) + gate.e_score_correction_bias
    groups = scores.view(len(scores), 4, 2).topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(groups).scatter(1, groups.topk(2, -1).indices, 1.0).repeat_interleave(2, -1)
    return scores.masked_fill(kept == 0, -math.inf).topk(2, -1).indices


NAIVE = {
    "mixtral": softmax_choice,
    "qwen3_moe": softmax_choice,
    "dbrx": softmax_choice,  # the parent module chooses, and does not return its choice
    "gpt_oss": logits_choice,  # top-k first, then softmax
    "llama4_text": logits_choice,  # returns no choice
    "deepseek_v3": grouped_choice,
}


@torch.no_grad()
def naive_choices(model, ids):
    """For each router, the probabilities `(T, E)` and the experts `(T, k)` of the tokens `ids`, unpadded."""
    recorded = model.model if model.config.model_type != "dbrx" else model.transformer
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    found = []
    for index, logits in enumerate(recorded(torch.tensor([ids]), output_router_logits=True).router_logits):
        z = logits.reshape(-1, logits.shape[-1])
        chosen = NAIVE[model.config.model_type](z, gates[index] if gates else None)
        sigmoid = model.config.model_type in ("deepseek_v3", "llama4_text")
        scores = torch.sigmoid(z.double()) if sigmoid else z.double().softmax(-1)
        found.append((scores / scores.sum(-1, keepdim=True), chosen))
    return found
