"""A resumed run ends bit-identical to one that was never interrupted. Kills: `test_checkpoints`."""

import shutil
from pathlib import Path

import pytest
import torch
from checks import assert_same
from tiny import tiny_model
from training import make_trainer, patched, rows, weights
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


pytestmark = pytest.mark.slow


CONFIGS = {
    "gradient": ("qwen3_moe", {"ema_rate": 0.4}),
    "native_bias": ("deepseek_v3", {"coef": 20.0, "bias_coef": 0.05}),
    "bias": ("mixtral", {"coef": 0.0, "bias_coef": 0.05, "track": "load"}),
}
# 14 rows: an epoch is two steps of 3 micro-batches and one of 1; a checkpoint falls in the middle of the second epoch
ARGUMENTS = {
    "num_train_epochs": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_accumulation_steps": 3,
}
STEPS = 6


class StopAt(TrainerCallback):
    """Ends the run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def run(
    folder, case="gradient", attach=True, cls=Trainer, resume=None, callbacks=(), seed=0, fresh_duals=False, **more
):
    """Trains a fresh model; `seed` is that of its first weights, which a checkpoint must overwrite."""
    model_type, config = CONFIGS[case]
    model = patched(model_type, seed=seed, **config)
    callbacks = [*callbacks, *([] if attach else [phb.PhiBalanceCallback()])]
    trainer = make_trainer(model, folder, cls, data=rows(14), callbacks=callbacks, **ARGUMENTS | more)
    if attach:
        phb.attach(trainer, fresh_duals=fresh_duals)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer):
    """Weights, optimizer and duals at the end of a run, and its log."""
    balancer = phb.get_balancer(trainer.model)
    optimizer = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, state in trainer.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    of_process = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "num_tokens")
    logged = [{k: v for k, v in entry.items() if k not in of_process} for entry in trainer.state.log_history]
    tensors = {
        "weights": weights(trainer.model),
        "optimizer": optimizer,
        "duals": balancer.state_dict(),
        "prices": balancer.prices(),
        "biases": balancer.biases(),
    }
    return tensors, logged


def assert_same_outcome(resumed, straight):
    left, right = outcome(resumed), outcome(straight)
    assert resumed.state.global_step == straight.state.global_step == STEPS
    assert len(left[0]["optimizer"]) > 10
    assert_same(left[0], right[0])
    assert left[1] == right[1]


@pytest.mark.parametrize(
    ("case", "way"), [*((case, way) for case in CONFIGS for way in ("attach", "alone")), ("gradient", "sft")]
)
def test_resumed_run_equals_the_uninterrupted_one(case, way, tmp_path):
    kwargs = {"case": case, "attach": way != "alone", "cls": SFTTrainer if way == "sft" else Trainer}
    straight = run(tmp_path / "straight", **kwargs)
    run(tmp_path / "stopped", callbacks=[StopAt(4)], **kwargs)
    assert sorted(p.name for p in (tmp_path / "stopped").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    resumed = run(tmp_path / "stopped", resume=True, seed=1, **kwargs)
    assert_same_outcome(resumed, straight)

    balancer = phb.get_balancer(straight.model)
    assert min((mean - 1 / len(mean)).abs().max() for mean in balancer.means().values()) > 1e-3
    if case != "gradient":
        assert min(bias.abs().max() for bias in balancer.biases().values()) > 1e-2


def test_the_duals_decide_the_resumed_run(tmp_path):
    """Guards the test above: with the duals of another step the run ends otherwise."""
    straight = run(tmp_path / "straight")
    folder = tmp_path / "straight"
    shutil.copy(folder / "checkpoint-2" / STATE_NAME, folder / "checkpoint-4" / STATE_NAME)
    resumed = run(tmp_path / "other", resume=str(folder / "checkpoint-4"))
    name = "model.layers.2.mlp.gate.weight"
    assert not torch.equal(weights(resumed.model)[name], weights(straight.model)[name])


def test_checkpoint_outside_the_output_folder(tmp_path):
    straight = run(tmp_path / "straight", "bias")
    outside = tmp_path / "elsewhere" / "kept"
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", outside)
    assert_same_outcome(run(tmp_path / "new", "bias", resume=str(outside), seed=1), straight)


@pytest.mark.parametrize("attach", [True, False])
def test_checkpoint_without_duals_is_refused(attach, tmp_path):
    run(tmp_path, callbacks=[StopAt(2)], attach=attach)
    (tmp_path / "checkpoint-2" / STATE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=rf"resumes at step 2, but there is no {STATE_NAME} in .*checkpoint-2"):
        run(tmp_path, resume=True, attach=attach)


def test_fresh_duals_can_be_asked_for(tmp_path, warned):
    """The resumed run has the weights of the checkpoint and uniform means. A state that is there is used all the same."""
    run(tmp_path, callbacks=[StopAt(2)])
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "kept")
    (tmp_path / "checkpoint-2" / STATE_NAME).unlink()
    first = Snapshots()
    run(tmp_path, resume=True, seed=1, callbacks=[first, StopAt(3)], fresh_duals=True)
    assert warned.about("resumes with fresh duals")
    assert first.by_step[3]["duals"]["steps"] == 1
    run(tmp_path, resume=str(tmp_path / "kept"), seed=1, callbacks=[first, StopAt(3)], fresh_duals=True)
    assert first.by_step[3]["duals"]["steps"] == 3


def test_duals_of_another_run_are_not_taken_instead(tmp_path):
    """The named checkpoint has no duals. The output folder has a checkpoint of the same step, but of another run."""
    run(tmp_path / "here", callbacks=[StopAt(2)])
    run(tmp_path / "there", callbacks=[StopAt(2)], seed=1)
    (tmp_path / "there" / "checkpoint-2" / STATE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {STATE_NAME} in .*there"):
        run(tmp_path / "here", resume=str(tmp_path / "there" / "checkpoint-2"))


def test_checkpoint_of_an_unbalanced_run_is_refused(tmp_path):
    model = tiny_model("qwen3_moe").train()
    make_trainer(model, tmp_path, data=rows(14), callbacks=[StopAt(2)], **ARGUMENTS).train()
    with pytest.raises(FileNotFoundError, match="Resume from a checkpoint written while balancing"):
        run(tmp_path, resume=True)


# ---------------------------------------------------------------------- which checkpoint is kept


class Snapshots(TrainerCallback):
    """Weights and duals after every step."""

    def __init__(self):
        self.by_step = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        balancer = phb.get_balancer(model)
        self.by_step[state.global_step] = {
            "weights": weights(model),
            "duals": balancer.state_dict(),
            "prices": balancer.prices(),
        }


class FourthIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_made_up"] = abs(state.global_step - 4)


@pytest.mark.parametrize(("case", "attach"), [("native_bias", True), ("bias", False)])
def test_best_model_comes_back_with_its_duals(case, attach, tmp_path):
    snapshots = Snapshots()
    model_type, config = CONFIGS[case]
    model = patched(model_type, **config)
    arguments = ARGUMENTS | {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "made_up",
        "greater_is_better": False,
        "save_total_limit": 1,
    }
    callbacks = [snapshots, FourthIsBest(), *([] if attach else [phb.PhiBalanceCallback()])]
    trainer = make_trainer(model, tmp_path, data=rows(14), eval_dataset=rows(3), callbacks=callbacks, **arguments)
    if attach:
        phb.attach(trainer)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    balancer = phb.get_balancer(model)
    now = {"weights": weights(model), "duals": balancer.state_dict(), "prices": balancer.prices()}
    assert_same(now, snapshots.by_step[4])
    assert not torch.equal(now["weights"]["lm_head.weight"], snapshots.by_step[STEPS]["weights"]["lm_head.weight"])


def test_sharded_checkpoint_resumes(tmp_path):
    """`Trainer` reads weights in several files by other code."""
    straight = run(tmp_path / "straight", "bias")
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    model = type(straight.model).from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="150KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    assert_same_outcome(run(tmp_path / "new", "bias", resume=str(checkpoint), seed=1), straight)
