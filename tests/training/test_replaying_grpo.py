"""GRPO whose policy update replays the experts that the routers chose while it generated, as `replaying()` describes it."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from references import routers
from replay import Rollouts, replayed
from tiny import tiny_model
from training import tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import hf_phibalance as phb


STEPS = 3


def run(model_type, folder):
    """Trains; the biases before, and of each update its tokens, choices, loads, and biases as they were before it."""
    model = tiny_model(model_type).train()
    rollouts, updates = Rollouts(model), []

    class ReplayingTrainer(GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            balancer = phb.get_balancer(model)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).flatten().bool()
            choices = rollouts.of(ids)
            updates.append((mask, choices))
            with balancer.replaying(), replayed(model, choices):
                return super().compute_loss(model, inputs, *args, **kwargs)

    words = " ".join(f"w{i}" for i in range(10, 14))
    args = GRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=5,
        generation_kwargs={"min_new_tokens": 5},
        gradient_checkpointing=False,
        learning_rate=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = ReplayingTrainer(
        model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": words}] * 8),
        processing_class=tokenizer(),
    )
    phb.patch(model, {"coef": 0.05, "bias_coef": 0.02})
    phb.attach(trainer)
    balancer = phb.get_balancer(model)
    state = balancer.state_dict()
    for name in state:
        if name.endswith(".bias"):  # as after a pre-training with biases
            state[name] = torch.linspace(-0.2, 0.2, 8)
    balancer.load_state_dict(state)
    biases = balancer.biases()
    native = {name: r.e_score_correction_bias.clone() for name, r in routers(model).items() if model_type != "mixtral"}
    loads = []

    class Loads(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            loads.append(balancer.loads())

    trainer.add_callback(Loads())
    before = balancer.prices()
    trainer.train()
    return model, trainer, updates, loads, biases, native, before


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_grpo_replays_its_rollouts(model_type, tmp_path):
    model, trainer, updates, loads, biases, native, prices = run(model_type, tmp_path)
    balancer = phb.get_balancer(model)
    assert len(updates) == len(loads) == STEPS == balancer.steps
    for (mask, choices), load in zip(updates, loads):
        for name, chosen in choices.items():
            found = Counter(chosen[mask].flatten().tolist())
            assert load[name].tolist() == [float(found[e]) for e in range(8)]
    assert all(torch.equal(bias, biases[name]) for name, bias in balancer.biases().items())
    assert all(torch.equal(routers(model)[name].e_score_correction_bias, bias) for name, bias in native.items())
    assert all(not torch.equal(price, prices[name]) for name, price in balancer.prices().items())
    assert [entry["moe/tokens"] for entry in trainer.state.log_history if "moe/tokens" in entry] == [
        float(mask.sum()) for mask, _ in updates
    ]
