"""Tiny models of remote code, with the gates of the first DeepSeek-MoE and of Moonlight."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_deepseek"
    hidden_size = 16
    vocab_size = 128
    num_hidden_layers = 2
    n_routed_experts = 8
    num_experts_per_tok = 2
    scoring_func = "softmax"
    norm_topk_prob = False
    aux_loss_alpha = 0.05
    corrected = False  # as in Moonlight: selects with a bias, returns no loss


class MoEGate(nn.Module):
    """Has the interface of the gates of the first DeepSeek-MoE and of Moonlight, not their code."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.n_routed_experts = config.num_experts_per_tok, config.n_routed_experts
        self.scoring_func, self.norm_topk_prob = config.scoring_func, config.norm_topk_prob
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size))
        if config.corrected:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts))
        else:
            self.alpha = config.aux_loss_alpha

    def forward(self, hidden_states):
        _, _, width = hidden_states.shape
        logits = F.linear(hidden_states.view(-1, width), self.weight)
        scores = logits.softmax(dim=-1) if self.scoring_func == "softmax" else logits.sigmoid()
        if hasattr(self, "e_score_correction_bias"):
            _, topk_idx = torch.topk(
                scores + self.e_score_correction_bias.detach(), k=self.top_k, dim=-1, sorted=False
            )
            topk_weight = scores.gather(1, topk_idx)
        else:
            topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        if hasattr(self, "e_score_correction_bias"):
            return topk_idx, topk_weight
        aux_loss = None
        if self.training and self.alpha > 0.0:
            load = F.one_hot(topk_idx, self.n_routed_experts).float().mean(dim=(0, 1)) * self.n_routed_experts
            aux_loss = (load * scores.mean(dim=0)).sum() * self.alpha
        return topk_idx, topk_weight, aux_loss


class AddAuxiliaryLoss(torch.autograd.Function):
    """Adds the gradient of `loss` to the backward of `x`. Requires a loss, like the original."""

    @staticmethod
    def forward(ctx, x, loss):
        assert loss.numel() == 1
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones(1, dtype=ctx.dtype).squeeze()


class RemoteBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.n_routed_experts)
        )

    def forward(self, hidden_states):
        topk_idx, topk_weight, *aux_loss = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        every = torch.stack([expert(flat) for expert in self.experts], dim=1)
        chosen = every.gather(1, topk_idx.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        y = (chosen * topk_weight.unsqueeze(-1)).sum(dim=1).view_as(hidden_states)
        if self.training and aux_loss:
            y = AddAuxiliaryLoss.apply(y, aux_loss[0])
        return hidden_states + y


class RemotePreTrainedModel(PreTrainedModel):
    config_class = RemoteConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        pass


class RemoteModel(RemotePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RemoteBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class RemoteForCausalLM(RemotePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = RemoteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, attention_mask))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)


REMOTE = {
    "deepseek": {},
    "deepseek, normalised": {"norm_topk_prob": True},
    "moonlight": {"corrected": True, "scoring_func": "sigmoid", "norm_topk_prob": True},
}


def remote_model(kind):
    config = RemoteConfig()
    for name, value in REMOTE[kind].items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RemoteForCausalLM(config).train()
