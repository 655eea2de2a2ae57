"""`attach(trainer, verify=True)` and `doctor(trainer)` leave no trace. The first ends a training that would go wrong."""

import gc
import random
import re

import numpy as np
import pytest
import torch
from checks import assert_same
from datasets import IterableDataset
from tiny import tiny_model
from training import make_trainer, patched, rows, weights
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


class Seen(TrainerCallback):
    """Notes the events of the user's callbacks and the inputs of the model, in order."""

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
    """Trains with NEFTune's noise and dropout. Returns all that the training leaves."""
    torch.manual_seed(0)
    model = patched(model_args={"attention_dropout": 0.3}, bias_coef=0.05)
    seen = Seen(model)
    arguments |= {"optim": "adamw_torch", "neftune_noise_alpha": 5.0, "num_train_epochs": 1}
    trainer = make_trainer(model, folder, cls, callbacks=[seen], **arguments)
    callback = phb.attach(trainer, verify=verify)
    before = len(vars(trainer)), dict(vars(trainer.accelerator.gradient_state)), len(trainer.accelerator._dataloaders)
    if doctor:
        assert phb.doctor(trainer).coefficient is not None
        state = dict(vars(trainer.accelerator.gradient_state))
        assert before == (len(vars(trainer)), state, len(trainer.accelerator._dataloaders))
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


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_training_is_bit_identical(tmp_path, cls, reentrant):
    arguments = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    left, logs, events, fed, callback = trained(tmp_path, cls, **arguments)
    assert callback.report is None and len(fed) == 6
    for how in ({"verify": True}, {"doctor": True}):
        other_left, other_logs, other_events, other_fed, callback = trained(tmp_path, cls, **how, **arguments)
        assert_same(left, other_left)
        assert logs == other_logs and events == other_events
        assert len(fed) == len(other_fed) and all(torch.equal(a, b) for a, b in zip(fed, other_fed))
        assert (callback.report is not None) == ("verify" in how)
    assert len({row["loss"] for row in logs if "loss" in row}) == 2


def verified(folder, cls=Trainer, model=None, attach=None, **arguments):
    """Trains with `verify=True`. Returns the report."""
    trainer = make_trainer(patched(coef=0.01) if model is None else model, folder, cls, **arguments)
    callback = phb.attach(trainer, verify=True, **(attach or {}))
    trainer.train()
    return callback.report


def check(report, name):
    return next(check for check in report.checks if check.name == name)


def test_the_report_is_kept_and_said(tmp_path, warned):
    """The second step is measured, since the first has no prices."""
    model = patched(bias_coef=0.05, coef=0.01)
    report = verified(tmp_path, model=model)
    assert report.coefficient.ratio == pytest.approx(1, abs=1e-4) and report.exit_status() == 0
    assert report.measured == "optimizer step 2 of Trainer, 2 micro-batches"
    assert len(warned.about("! selection bias")) == 1 and phb.get_balancer(model).steps == 4
    assert phb.get_balancer(model).forwards.recorder is None


def test_one_step_without_prices_is_all_there_is(tmp_path, warned):
    assert verified(tmp_path, max_steps=1).coefficient is None and len(warned.about("all prices are 0")) == 1


@pytest.mark.parametrize("config, attach", [({"method": "switch"}, {}), ({"coef": 0.01}, {"calibrate": 1})])
def test_calibrated_prices_and_those_of_the_batch_are_measured_at_once(tmp_path, config, attach):
    report = verified(tmp_path, model=phb.patch(tiny_model("mixtral").train(), config), attach=attach)
    assert report.measured.startswith("optimizer step 1")
    assert report.coefficient.ratio == pytest.approx(1, abs=1e-4)


def test_accumulation_over_the_end_of_an_epoch(tmp_path):
    """A stream of unknown length with seven batches, four a step: the last step of an epoch goes on in the next one."""
    data = IterableDataset.from_generator(lambda: iter(rows(14).to_list()))
    report = verified(tmp_path, data=data, max_steps=4, num_train_epochs=1)
    assert "optimizer step 2 of Trainer, 7 micro-batches" in report.measured, report
    found = check(report, "coefficient")
    assert found.status == "warning" and "goes on over the end of a pass" in found.finding
    assert report.coefficient.ratio == pytest.approx(1, abs=1e-2)


class Halves(Trainer):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        return loss


class DropsMask(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "attention_mask"}, **kwargs)


class Trims(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, {k: v[:, :-2] for k, v in inputs.items()}, **kwargs)


class Elsewhere(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return model.lm_head(torch.ones(1, 32)).sum()


def test_problems_end_training_before_the_optimizer_steps(tmp_path):
    left = []
    for cls, max_steps in ((Trainer, 1), (Halves, 9)):
        model = patched(coef=0.01)
        trainer = make_trainer(model, tmp_path, cls, gradient_accumulation_steps=1, max_steps=max_steps)
        if cls is Halves:
            trainer.args.learning_rate *= 2  # of half a gradient
            phb.attach(trainer, verify=True)
            with pytest.raises(ValueError, match=r"(?s)verify=True.*ratio 0\.5000.*training_step"):
                trainer.train()
        else:
            trainer.train()
        assert phb.get_balancer(model).steps == 1 and trainer.state.global_step == 1
        assert not phb.get_balancer(model).is_trained_on
        left.append(weights(model))
    assert_same(*left)


@pytest.mark.parametrize(
    "cls, name, words, remedy",
    [
        (DropsMask, "attention mask", "the model received none", "token_mask='labels'"),
        (Elsewhere, "first step", "no training forward", "trains this model"),
    ],
)
def test_what_a_trainer_does_to_tokens_is_found_in_the_first_step(tmp_path, cls, name, words, remedy):
    trainer = make_trainer(patched(coef=0.01), tmp_path, cls)
    callback = phb.attach(trainer, verify=True)
    with pytest.raises(ValueError, match="verify=True"):
        trainer.train()
    found = check(callback.report, name)
    assert found.status == "problem" and words in found.finding and remedy in found.remedy
    assert trainer.state.global_step == 0


def test_tokens_that_the_trainer_drops(tmp_path):
    """Each micro-batch gets the share that was announced. They sum to the declared coefficient, but differ in size."""
    report = verified(tmp_path, Trims)
    found = check(report, "announced tokens")
    announced, seen = map(int, re.findall(r"\d+", found.finding))
    assert found.status == "warning" and seen < announced
    assert check(report, "coefficient").status == "warning" and not report.problems
    assert report.coefficient.ratio == pytest.approx(1, abs=0.1) and report.coefficient.residual > 1e-2


class Peeks(Trainer):
    """Makes one more forward, in train mode and with gradients, without a backward."""

    def compute_loss(self, model, inputs, **kwargs):
        super().compute_loss(model, inputs, **kwargs)
        return super().compute_loss(model, inputs, **kwargs)


def test_a_forward_without_backward_stays_out(tmp_path):
    """The recorder does not keep the forward alive, and makes no cycle that only the garbage collector would find."""
    gc.disable()
    try:
        report = verified(tmp_path, Peeks)
    finally:
        gc.enable()
    assert report.status == "ok" and report.coefficient.residual < 1e-4, report
    counted, labelled = re.search(r"(\d+) of \d+ positions count; (\d+) have labels", str(report)).groups()
    assert counted == labelled


def test_a_resumed_training_is_verified_in_its_first_step(tmp_path):
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
    assert callback.report.measured.startswith("optimizer step 2") and callback.report.coefficient is not None


class Fails(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        if self.state.global_step == 1:
            raise KeyError("labels")
        return super().compute_loss(model, inputs, **kwargs)


def test_an_interrupted_step_is_not_recorded_further(tmp_path):
    model = patched(coef=0.5)
    trainer = make_trainer(model, tmp_path, Fails)
    callback = phb.attach(trainer, verify=True)
    with pytest.raises(KeyError):
        trainer.train()
    assert phb.get_balancer(model).forwards.recorder is None and callback.report is None


def test_a_batch_is_not_for_a_trainer(tmp_path):
    trainer = make_trainer(patched(), tmp_path)
    with pytest.raises(ValueError, match="Leave it out"):
        phb.doctor(trainer, {})
