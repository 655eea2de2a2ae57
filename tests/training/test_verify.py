"""`attach(trainer, verify=True)` and `doctor(trainer)` leave no trace, and the first ends what would go wrong."""

import random

import numpy as np
import pytest
import torch
from checks import assert_same
from training import make_trainer, patched, weights
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import hf_phibalance as phb


class Seen(TrainerCallback):
    """What happens to the user's callbacks and to the model, in order."""

    def __init__(self, model):
        self.events, self.fed = [], []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.fed.append(kwargs["input_ids"].clone())

    def on_train_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(sorted(logs))


def trained(folder, cls, verify=False, doctor=False, **arguments):
    """Everything that a training leaves, with NEFTune's noise and dropout for whatever draws random numbers."""
    torch.manual_seed(0)
    model = patched(model_args={"attention_dropout": 0.3}, bias_coef=0.05)
    seen = Seen(model)
    trainer = make_trainer(
        model,
        folder,
        cls,
        callbacks=[seen],
        optim="adamw_torch",
        neftune_noise_alpha=5.0,
        num_train_epochs=1,
        **arguments,
    )
    callback = phb.attach(trainer, verify=verify)
    before = len(vars(trainer)), dict(vars(trainer.accelerator.gradient_state))
    if doctor:
        assert phb.doctor(trainer).coefficient is not None
        assert before == (len(vars(trainer)), dict(vars(trainer.accelerator.gradient_state)))
        assert seen.events == [] and trainer.optimizer is None and trainer.state.global_step == 0
        assert all(parameter.grad is None for parameter in model.parameters())
        assert trainer.model_wrapped is model and not trainer.is_in_train
    count = len(seen.fed)
    trainer.train()
    logs = [
        {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
        for row in trainer.state.log_history
    ]
    optimizer = trainer.optimizer.state_dict()["state"]
    left = {
        "weights": weights(model),
        "duals": phb.get_balancer(model).state_dict(),
        "optimizer": {str(number): dict(entry) for number, entry in optimizer.items()},
        "random": {"torch": torch.get_rng_state(), "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64))},
        "python": {"state": torch.tensor(random.getstate()[1])},
        "loads": phb.get_balancer(model).loads(),
    }
    return left, logs, seen.events, seen.fed[count:], callback


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_training_is_bit_identical(tmp_path, cls):
    left, logs, events, fed, callback = trained(tmp_path, cls)
    assert callback.report is None and len(fed) == 6
    for how in ({"verify": True}, {"doctor": True}):
        other_left, other_logs, other_events, other_fed, callback = trained(tmp_path, cls, **how)
        assert_same(left, other_left)
        assert logs == other_logs and events == other_events
        last = other_fed[-len(fed) :]  # before them, in the same forward hooks, those of the trial
        assert all(torch.equal(a, b) for a, b in zip(fed, last))
    assert len({row["loss"] for row in logs if "loss" in row}) == 2


def test_the_report_is_kept_and_said(tmp_path, warned):
    model = patched(bias_coef=0.05, coef=0.01)
    trainer = make_trainer(model, tmp_path, max_steps=1)
    callback = phb.attach(trainer, verify=True)
    trainer.train()
    assert callback.report.coefficient.ratio == pytest.approx(1, abs=1e-4)
    assert len(warned.about("! selection bias")) == 1 and phb.get_balancer(model).steps == 1
    assert callback.report.exit_status() == 0


class Halves(Trainer):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        return loss


def test_problems_end_training_before_it_begins(tmp_path):
    model = patched(coef=0.01)
    before = weights(model)
    trainer = make_trainer(model, tmp_path, Halves, gradient_accumulation_steps=1)
    phb.attach(trainer, verify=True)
    with pytest.raises(ValueError, match=r"(?s)verify=True.*ratio 0\.5000.*training_step"):
        trainer.train()
    assert_same(before, weights(model))
    assert phb.get_balancer(model).steps == 0 and trainer.state.global_step == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resumed_training_is_verified_with_its_own_duals(tmp_path):
    """Known prices take their place for the trial only."""
    duals = []
    for verify in (False, True):
        folder = tmp_path / str(verify)
        model = patched(coef=0.5)
        trainer = make_trainer(model, folder, max_steps=2, save_strategy="steps", save_steps=1)
        phb.attach(trainer)
        trainer.train()
        model = patched(coef=0.5)
        trainer = make_trainer(model, folder, max_steps=2, save_strategy="no")
        callback = phb.attach(trainer, verify=verify)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
        assert (callback.report is not None) == verify
        duals.append({"duals": phb.get_balancer(model).state_dict(), "weights": weights(model)})
    assert_same(*duals)


def test_a_batch_is_not_for_a_trainer(tmp_path):
    trainer = make_trainer(patched(), tmp_path)
    with pytest.raises(ValueError, match="Leave it out"):
        phb.doctor(trainer, {})
