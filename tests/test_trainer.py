"""φ-balancing inside `Trainer` and TRL's `SFTTrainer`: the definition is followed, and only it."""

import copy
import logging

import pytest
import torch
from tiny import tiny_batch, tiny_model
from training import TRAINERS, Recorder, assert_same, make_trainer, naive_training, patched, routed, rows, weights
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import hf_phibalance as phb


CONFIGS = {
    "probs": ("mixtral", {}),
    "load": ("qwen3_moe", {"track": "load", "ema_rate": 0.6}),
    "native_bias": ("deepseek_v3", {"bias_coef": 0.05}),
    "bias": ("mixtral", {"bias_coef": 0.05, "bias_track": "probs"}),
}


@pytest.mark.parametrize("cls", TRAINERS)
@pytest.mark.parametrize("case", CONFIGS)
def test_training_follows_the_definition(case, cls, tmp_path):
    """Weights and duals == a plain loop over an unpatched twin with the price term in its loss; unequal padded
    micro-batches, and fewer of them in the last step of an epoch."""
    model_type, config = CONFIGS[case]
    model = patched(model_type, **config)
    config = phb.get_balancer(model).config
    recorder = Recorder(model)
    trainer = make_trainer(model, tmp_path, cls, callbacks=[recorder])
    phb.attach(trainer)
    trainer.train()
    assert [len(step) for step in recorder.steps] == [4, 2, 4, 2]
    assert len({batch["attention_mask"].sum().item() for step in recorder.steps for batch in step}) > 4

    twin = tiny_model(model_type).train()
    expected = naive_training(twin, recorder.steps, config, lr=trainer.args.learning_rate)
    for left, right in zip(recorder.duals, expected):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=1e-5)

    unpriced = tiny_model(model_type).train()
    naive_training(unpriced, recorder.steps, phb.PhiBalanceConfig(coef=0.0), lr=trainer.args.learning_rate)
    routers = [name for name in weights(model) if name.endswith("gate.weight")]
    assert len(routers) >= 2
    for name in routers:
        assert (weights(model)[name] - weights(unpriced)[name]).abs().max() > 1e-3
