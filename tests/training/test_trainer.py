"""
φ-balancing inside `Trainer` and TRL's `SFTTrainer` follows the definition, with `attach`, with the callback, and with neither. Other
arguments, fp16 and other TRL trainers: `tests/ordinary/test_trainer_features.py`.
"""

import copy
import logging

import pytest
import torch
from charging import COEF
from checks import assert_same
from references import LOSSES, naive_training
from steps import assert_gradient, build, loss_gradient
from tiny import tiny_batch, tiny_model
from training import TRAINERS, Recorder, make_trainer, patched, rows, weights
from trl import SFTTrainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


CONFIGS = {
    "probs": ("mixtral", {}),
    "load": ("qwen3_moe", {"track": "load", "ema_rate": 0.6}),
    "native_bias": ("deepseek_v3", {"coef": 20.0, "bias_coef": 0.05}),
    "bias": ("mixtral", {"bias_coef": 0.05, "bias_track": "probs"}),
}


@pytest.mark.parametrize("cls", TRAINERS)
@pytest.mark.parametrize("case", CONFIGS)
def test_training_follows_the_definition(case, cls, tmp_path):
    """Weights and duals equal those of a plain loop over an unpatched model with the price term in its loss. Micro-batches are
    padded and of unequal length, with fewer of them in the last step of an epoch."""
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


# ---------------------------------------------------------------------- attach


def test_a_trainer_takes_the_declared_step(tmp_path):
    """One SGD step of 3 accumulated micro-batches: the weights move by the task gradient and that of the formula."""
    lr, data = 0.1, rows(6)
    moved, fed = {}, {}
    for method in ("none", *LOSSES):
        model = phb.patch(build("mixtral"), {"method": method} | ({"coef": COEF} if method in LOSSES else {}))
        trainer = make_trainer(
            model, tmp_path, data=data, max_steps=1, gradient_accumulation_steps=3, learning_rate=lr
        )
        phb.attach(trainer)
        noted = fed[method] = []

        def note(module, args, kwargs, noted=noted):
            noted.append({key: kwargs[key] for key in ("input_ids", "attention_mask", "labels")})

        model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.train()
        moved[method] = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
    for method, loss in LOSSES.items():
        assert len(fed[method]) == 3
        added = {key: (moved["none"][key] - moved[method][key]) / lr for key in moved[method]}
        assert_gradient(added, loss_gradient(build("mixtral"), fed[method], [(COEF, loss)]), tolerance=1e-3)


def test_attach_needs_a_patched_model(tmp_path):
    trainer = make_trainer(tiny_model("mixtral"), tmp_path)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM is not φ-balanced; call phb\.patch\(model\) first"):
        phb.attach(trainer)


def test_callback_needs_a_patched_model(tmp_path):
    model = tiny_model("mixtral")
    trainer = make_trainer(model, tmp_path, callbacks=[phb.PhiBalanceCallback()])
    with pytest.raises(ValueError, match=r"MixtralForCausalLM is not φ-balanced; call phb\.patch\(model\) first"):
        trainer.train()
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(model)


def test_attach_is_idempotent_and_takes_the_callback_that_is_there(tmp_path):
    own = phb.PhiBalanceCallback(per_layer=1)
    trainer = make_trainer(patched(), tmp_path, callbacks=[own], max_steps=2)
    assert phb.attach(trainer) is own
    wired = trainer.log, trainer.get_batch_samples, trainer.evaluate
    assert phb.attach(trainer) is own
    assert (trainer.log, trainer.get_batch_samples, trainer.evaluate) == wired
    assert sum(isinstance(callback, phb.PhiBalanceCallback) for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert phb.get_balancer(trainer.model).steps == 2
    fresh = make_trainer(patched(), tmp_path)
    assert isinstance(phb.attach(fresh), phb.PhiBalanceCallback)


@pytest.mark.parametrize("unpatched", [True, False])
def test_attach_follows_a_model_that_is_patched_anew(unpatched, tmp_path):
    """A trainer that was attached before uses the new configuration exactly."""
    model = patched(coef=0.1)
    trainer = make_trainer(model, tmp_path)
    phb.attach(trainer)
    if unpatched:
        phb.unpatch(model)
    phb.patch(model, {"coef": 5.0})
    recorder = Recorder(model)
    trainer.add_callback(recorder)
    trainer.train()
    twin = tiny_model("mixtral").train()
    expected = naive_training(twin, recorder.steps, phb.PhiBalanceConfig(coef=5.0), lr=trainer.args.learning_rate)
    torch.testing.assert_close(recorder.duals[-1], expected[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=1e-5)
    assert trainer.state.log_history[-2]["moe/tokens"] == sum(b["attention_mask"].sum() for b in recorder.steps[-1])


def test_detached_is_as_never_attached(tmp_path):
    """Methods and callbacks are as before; the model stays patched, and can be attached anew."""
    model = patched()
    trainer = make_trainer(model, tmp_path, max_steps=1)
    own, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    phb.attach(trainer).detach()
    assert vars(trainer).keys() == own.keys()
    assert all(vars(trainer)[name] is value for name, value in own.items())
    assert trainer.callback_handler.callbacks == callbacks
    callback = phb.attach(trainer)
    trainer.train()
    assert phb.get_balancer(model).steps == 1 and len(callback.history) == 1


# ---------------------------------------------------------------------- the callback alone, and the flag alone


def test_a_patched_model_is_enough(tmp_path):
    """With the callback or with the flag alone, a run equals one with `attach`."""
    trained = {}
    for way in ("attach", "callback", "flag"):
        model = patched("deepseek_v3", bias_coef=0.05)
        callbacks = [phb.PhiBalanceCallback()] if way == "callback" else []
        trainer = make_trainer(model, tmp_path, callbacks=callbacks)
        if way == "attach":
            phb.attach(trainer)
        trainer.train()
        balancer = phb.get_balancer(model)
        assert balancer.steps == trainer.state.global_step == 4
        logged = [{k: v for k, v in entry.items() if k.startswith("moe/")} for entry in trainer.state.log_history]
        assert [bool(entry) for entry in logged] == [True] * 4 + [False]
        trained[way] = {"weights": weights(model), "duals": balancer.state_dict()}, logged
    for way in ("callback", "flag"):
        assert_same(trained[way][0], trained["attach"][0])
        assert trained[way][1] == trained["attach"][1]


def test_a_patch_that_is_off_changes_nothing(tmp_path):
    off, plain = patched(coef=0.0), tiny_model("mixtral").train()
    make_trainer(off, tmp_path).train()
    make_trainer(plain, tmp_path).train()
    assert_same(weights(off), weights(plain))


def test_other_trainers_are_left_alone(tmp_path):
    """A patched model does nothing to the trainer of a plain one."""
    beside = patched()
    trainer = make_trainer(tiny_model("mixtral").train(), tmp_path, max_steps=1)
    own = dict(vars(trainer))
    trainer.train()
    added = vars(trainer).keys() - own.keys()
    assert not {"log", "evaluate", "train", "training_step", "get_batch_samples"} & added
    assert not any("moe" in key for entry in trainer.state.log_history for key in entry)
    assert phb.get_balancer(beside).steps == 0


# ---------------------------------------------------------------------- other auxiliary losses


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def forget(warned):
    """Resets `warned` to the start of a process."""
    warned.lines.clear()
    logging.Logger.warning_once.cache_clear()


@pytest.mark.parametrize(
    ("model_type", "patched_first"), [("mixtral", True), ("qwen3_moe", False), ("deepseek_v3", False)]
)
def test_attach_switches_off_the_loss_of_trl(model_type, patched_first, tmp_path, warned):
    """One notice, and the first loss is the same as if the user had switched it off."""
    losses = {}
    for coef in (0.0, 0.5):
        forget(warned)
        model = tiny_model(model_type).train()
        if patched_first:
            phb.patch(model)
        trainer = make_trainer(model, tmp_path, SFTTrainer, max_steps=1, router_aux_loss_coef=coef)
        phb.patch(model)
        assert trainer.aux_loss_enabled == (coef > 0)
        phb.attach(trainer)
        assert not trainer.aux_loss_enabled and trainer.router_aux_loss_coef == 0.0
        phb.attach(trainer)
        losses[coef] = first_loss(trainer)
        assert not any("aux_loss" in key for entry in trainer.state.log_history for key in entry)
        assert len(warned.about("auxiliary loss")) == len(warned.about("has been switched off")) == (coef > 0)
    assert losses[0.0] == losses[0.5]


def test_loss_of_trl_stays_on_while_ours_is_off(tmp_path):
    model = phb.patch(tiny_model("qwen3_moe").train(), {"coef": 0.0})
    plain = tiny_model("qwen3_moe").train()
    losses = []
    for each in (model, plain):
        trainer = make_trainer(each, tmp_path, SFTTrainer, max_steps=1, router_aux_loss_coef=0.5)
        if each is model:
            phb.attach(trainer)
        assert trainer.aux_loss_enabled
        losses.append(first_loss(trainer))
    without = make_trainer(
        tiny_model("qwen3_moe").train(), tmp_path, SFTTrainer, max_steps=1, router_aux_loss_coef=0.0
    )
    assert losses[0] == losses[1] > first_loss(without) + 0.1
    assert_same(weights(model), weights(plain))


def test_loss_of_trl_goes_off_without_attach_too(tmp_path):
    """TRL's default is the coefficient in the model's config. `patch` sets it to 0, unless the model is patched later."""
    losses = []
    for patched_first, coef in ((False, None), (True, 0.5), (False, 0.5), (True, None), (True, 0.0)):
        model = tiny_model("mixtral").train()
        assert model.config.router_aux_loss_coef > 0
        if patched_first:
            phb.patch(model)
        arguments = {} if coef is None else {"router_aux_loss_coef": coef}
        trainer = make_trainer(model, tmp_path, SFTTrainer, max_steps=1, **arguments)
        phb.patch(model)
        assert trainer.aux_loss_enabled == (coef != 0.0 and (coef is not None or not patched_first))
        losses.append(first_loss(trainer))
        assert not trainer.aux_loss_enabled
    assert len(set(losses)) == 1


def test_built_in_loss_is_off_while_ours_is_on(tmp_path, warned):
    aux = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    plain, without = tiny_model("qwen3_moe", **aux).train(), tiny_model("qwen3_moe").train()
    batch = tiny_batch(plain)
    stock, task = plain(**batch).loss, without(**batch).loss
    assert stock > task + 0.01
    for config, expected in (({}, task), ({"coef": 0.0, "bias_coef": 0.1}, task), ({"coef": 0.0}, stock)):
        model = tiny_model("qwen3_moe", **aux).train()
        before = copy.deepcopy(model.config.to_dict())
        forget(warned)
        phb.patch(model, config)
        phb.patch(model, config)
        assert torch.equal(model(**batch).loss, expected)
        assert len(warned.about("has been switched off")) == (expected is task)
        phb.unpatch(model)
        assert torch.equal(model(**batch).loss, stock)
        assert model.config.to_dict() == before

    trained = {}
    for coef in (None, 0.0, 0.01):
        model = tiny_model("qwen3_moe", **aux).train()
        trainer = make_trainer(model, tmp_path, max_steps=2)
        if coef is not None:
            phb.patch(model, {"coef": coef})
            phb.attach(trainer)
        trained[coef] = first_loss(trainer), weights(phb.unpatch(model))
        assert model.config.output_router_logits and model.config.router_aux_loss_coef == 0.02
    assert_same(trained[0.0][1], trained[None][1])
    assert trained[0.0][0] == trained[None][0] > trained[0.01][0]


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_routers_in_16_bits_are_said_when_training_begins(dtype, said, tmp_path, warned):
    make_trainer(patched().to(dtype), tmp_path, max_steps=1).train()
    assert len(warned.about("Routers are trained in bfloat16")) == said
