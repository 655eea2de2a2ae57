"""
The first DeepSeek-MoE (`deepseek-ai/deepseek-moe-16b-base` and `-chat`, model type `"deepseek"`) without remote code.

transformers has no class for it, and its remote code does not import under transformers 5. But transformers has its
decoder, as the text model of DeepSeek-OCR-2: Llama's attention, a dense first layer, then routed and shared experts
with a softmax top-k router that does not renormalise. This module adds a language-model head and reads the published
checkpoint. This router computes in fp32, the published one in the model's dtype. Remove this module when transformers
has the model type.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)
from transformers.utils import can_return_tuple

from ..files import quoted


MODEL_TYPE = "deepseek"


@strict
class DeepseekMoeConfig(DeepseekOcr2TextConfig):
    """
    Config of the published checkpoints.

    Args:
        first_k_dense_replace (`int`, *optional*, defaults to `1`): Number of dense layers at the start.
        moe_layer_freq (`int`, *optional*, defaults to `1`): After them, every `moe_layer_freq`-th layer is MoE.
        norm_topk_prob (`bool`, *optional*, defaults to `False`): The decoder supports only the default.
        scoring_func (`str`, *optional*, defaults to `"softmax"`): The decoder supports only the default.

    Raises:
        ValueError: If the config's router is not the published one.
    """

    model_type = MODEL_TYPE
    base_config_key = ""

    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs):
        if self.norm_topk_prob or self.scoring_func != "softmax":
            raise ValueError(
                f"norm_topk_prob={quoted(self.norm_topk_prob)} and scoring_func={quoted(self.scoring_func)}: the published "
                "DeepSeek-MoE has False and 'softmax', and its decoder here knows nothing else. Set these."
            )
        self.mlp_layer_types = [
            "sparse" if i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0 else "dense"
            for i in range(self.num_hidden_layers)
        ]
        super().__post_init__(**kwargs)


class DeepseekMoeForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """DeepSeek-MoE with a language-model head."""

    config_class = DeepseekMoeConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as transformers has it)
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekMoeConfig):
        super().__init__(config)
        self.model = DeepseekOcr2TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Standard forward of a causal language model. The loss has no auxiliary term."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T, V)
        return MoeCausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs),
            logits=logits,
            # the cache has different names in different versions
            **{name: value for name, value in outputs.items() if name != "last_hidden_state"},
        )


def register() -> None:
    """Registers the model type `"deepseek"` with transformers, so that it loads without `trust_remote_code`."""
    if MODEL_TYPE in CONFIG_MAPPING:
        return
    AutoConfig.register(MODEL_TYPE, DeepseekMoeConfig)
    AutoModelForCausalLM.register(DeepseekMoeConfig, DeepseekMoeForCausalLM)
    register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
