"""An Axolotl plugin that compares the gradient the optimizer received in the first step with the definition.

Name it in the YAML after hf_phibalance's plugin. It writes `measured.json` into `output_dir` and ends the process.
"""

import copy
import json
import os
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from torch import nn
from transformers import TrainerCallback

import hf_phibalance as phb


class MeasuringPlugin(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        trainer.add_callback(Measuring(trainer, cfg.phi_balance["coef"]))


class Measuring(TrainerCallback):
    """Gives the duals random prices, and measures before the optimizer steps."""

    def __init__(self, trainer, coef):
        self.trainer, self.coef = trainer, coef
        inner = trainer.get_batch_samples

        def kept(*args, **kwargs):
            batches, self.items = inner(*args, **kwargs)
            self.batches = copy.deepcopy(batches)
            return batches, self.items

        trainer.get_batch_samples = kept

    def on_train_begin(self, args, state, control, **kwargs):
        balancer = phb.get_balancer(self.trainer.model)
        generator = torch.Generator().manual_seed(0)
        duals = balancer.state_dict()
        for name, value in duals.items():
            drawn = torch.randn(value.shape, generator=generator).softmax(-1) if value.ndim else torch.tensor(1)
            duals[name] = torch.zeros_like(value) if name.endswith("bias") else drawn
        balancer.load_state_dict(duals)
        self.sites, self.prices = balancer.sites, balancer.prices()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        received = self.gradient()
        phb.unpatch(self.trainer.model)
        for batch in copy.deepcopy(self.batches):
            self.trainer.training_step(self.trainer.model, batch, self.items)
        added = received - self.gradient()
        declared, tokens, padding = self.definition()
        outcome = {
            "ratio": float(added @ declared / (declared @ declared)),
            "residual": float((added - declared).norm() / declared.norm()),
            "tokens": tokens,
            "padding": padding,
            "masks": sum("attention_mask" in batch for batch in self.batches),
            "micro_batches": len(self.batches),
            "samples": sum(
                int((batch["position_ids"] == 0).sum()) for batch in self.batches if "position_ids" in batch
            ),
        }
        (Path(args.output_dir) / "measured.json").write_text(json.dumps(outcome))
        os._exit(0)

    def gradient(self):
        """Returns the gradient of all trainable parameters, and clears it."""
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).double() for p in parameters]
        )
        self.trainer.model.zero_grad()
        return flat

    def definition(self):
        """Returns the gradient of `coef * sum_layers mean_tokens <q, p>` of the unpatched model, by autograd."""
        self.trainer.model.gradient_checkpointing_disable()
        logits: dict[str, torch.Tensor] = {}
        for site in self.sites:
            site.modules[0].register_forward_hook(
                lambda _, args, output, name=site.name: logits.update({name: output[0]})
            )
        counted = [
            (batch["input_ids"] != self.trainer.processing_class.pad_token_id).reshape(-1) for batch in self.batches
        ]
        tokens = sum(int(mask.sum()) for mask in counted)
        for batch, mask in zip(self.batches, counted):
            # a packed row has no mask in Axolotl
            names = ("input_ids", "position_ids") if "position_ids" in batch else ("input_ids", "attention_mask")
            self.trainer.model(**{name: batch[name] for name in names})
            paid = [
                (nn.functional.softmax(logits[name].float(), -1)[mask] @ q).sum() for name, q in self.prices.items()
            ]
            (self.coef * sum(paid) / tokens).backward()
        return self.gradient(), tokens, sum(mask.numel() for mask in counted) - tokens
