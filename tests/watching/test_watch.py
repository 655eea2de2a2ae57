"""`phb.watch` in a loop of one's own: figures against a naive reference, alerts in real trainings, and no trace afterwards."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import forward
from tiny import tiny_batch, tiny_model
from training import make_trainer
from transformers import TrainerCallback

import hf_phibalance as phb
from hf_phibalance.watching import Thresholds, read_records


def train(model, watch, steps=12, every=4, lr=1e-3, batches=None, seed=0, done=0):
    """AdamW on random batches, after the `done` first steps. Returns what `watch.log` returned."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    logs = []
    for step in range(done + 1, steps + 1):
        batch = tiny_batch(model, batch=16, seed=seed + step) if batches is None else batches[step - 1]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            logs.append(watch.log(step))
    return logs


def test_a_row_against_the_unwatched_model(tmp_path):
    model = tiny_model("mixtral")
    batches = [tiny_batch(model, batch=3, seed=seed) for seed in range(4)]
    routed = [forward(model, batch)[1] for batch in batches]  # lr is 0, so that the model stays
    watch = phb.watch(model, tmp_path)
    (first, second) = train(model, watch, 4, 2, 0.0, batches)
    found = read_records(tmp_path)
    assert [(row["step"], row["steps"]) for row in found.rows] == [(2, 2), (4, 2)]
    for row, steps in zip(found.rows, ([0, 1], [2, 3])):
        assert row["tokens"] == sum(int(batches[step]["attention_mask"].sum()) for step in steps)
        for name, layer in row["layers"].items():
            assert layer["load"] == sum(routed[step][name].counts for step in steps).tolist()
            # how sure the router is, in the first step of each log
            reference = routed[steps[0]][name]
            mask = batches[steps[0]]["attention_mask"].flatten().bool()
            probs = reference.probs.reshape(len(mask), -1)[mask].double()
            chosen = probs.topk(2).values.sum(-1)
            bits = -(probs * probs.log2()).sum(-1)
            wanted = {"top1_probability": probs.amax(-1), "chosen_probability": chosen, "entropy_bits": bits}
            assert layer["confidence"] == pytest.approx(
                {key: value.mean().item() for key, value in wanted.items()}, rel=1e-4
            )
    assert second["moe/tokens"] == found.rows[1]["tokens"] / 2 and {"moe/max_vio", "moe/entropy"} <= first.keys()
    assert found.run["routers"][0] == {
        "name": "model.layers.0.mlp.gate", "experts": 8, "top_k": 2, "scoring": "softmax",
    }  # fmt: skip
    assert found.run["method"] == "none" and found.run["step"] == 0


def test_only_steps_that_are_logged_measure_confidence():
    model = tiny_model("mixtral")
    watch, measured = phb.watch(model), []
    balancer = phb.get_balancer(model)
    add = balancer.watcher
    balancer.watcher = lambda counts: (measured.append(bool(counts.confidence.any())), add(counts))
    train(model, watch, steps=7, every=3)
    assert measured == [True, False, False, True, False, False, True]


def test_gradient_accumulation_needs_no_announcement(tmp_path, caplog):
    model = tiny_model("mixtral").train()
    watch, optimizer = phb.watch(model, tmp_path), torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [tiny_batch(model, seed=seed) for seed in range(6)]
    with caplog.at_level("WARNING"):
        for start in (0, 3):
            for batch in batches[start : start + 3]:
                (model(**batch).loss / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watch.log()["moe/tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches) / 2
    assert read_records(tmp_path).rows[0]["step"] == 2 and not caplog.records


def test_stop_leaves_no_trace(tmp_path):
    model = tiny_model("mixtral")
    trainer = make_trainer(model, tmp_path)
    before, config = {name: dict(vars(module)) for name, module in model.named_modules()}, model.config.to_dict()
    callbacks, own = list(trainer.callback_handler.callbacks), dict(vars(trainer))
    phb.watch(trainer).stop()
    assert trainer.callback_handler.callbacks == callbacks and vars(trainer).keys() == own.keys()
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    balanced = phb.patch(tiny_model("mixtral"), {"coef": 0.1})
    watch = phb.watch(balanced)
    assert train(balanced, watch, 4)[0]["moe/balance_loss"]
    watch.stop()
    assert phb.get_balancer(balanced).watcher is None and phb.get_balancer(balanced).config.coef == 0.1


def test_saved_as_if_it_were_not_watched(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "plain")
    phb.watch(model)
    model.save_pretrained(tmp_path / "watched")
    plain, watched = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("plain", "watched"))
    assert plain == watched
    phb.patch(model, {"coef": 0.1})  # from now on it is balanced, and saved with its state
    model.save_pretrained(tmp_path / "balanced")
    assert (tmp_path / "balanced" / "phi_balance.state").is_file() and model.config.phi_balance["coef"] == 0.1
    phb.patch(model, {"method": "none"})
    assert not hasattr(model.config, "phi_balance")


def test_a_watch_that_has_ended_says_so():
    model = tiny_model("mixtral")
    first, second = phb.watch(model), phb.watch(model)
    with pytest.raises(RuntimeError, match="This watch was stopped, or its model was unpatched"):
        first.log()
    first.stop()  # nothing is left to stop
    assert train(model, second, 4)[0]["moe/tokens"]
    phb.unpatch(model)
    with pytest.raises(RuntimeError, match="This watch was stopped, or its model was unpatched"):
        second.log()


def test_steps_that_begin_anew_are_refused(tmp_path):
    model = tiny_model("mixtral")
    watch = phb.watch(model, tmp_path)
    train(model, watch, 4)
    with pytest.raises(ValueError, match="`step` must be after that of the last log, 4, got 4"):
        train(model, watch, 4)
    watch.log(np.int64(9))
    assert [row["step"] for row in read_records(tmp_path).rows] == [4, 9]


def test_stop_keeps_a_balance_that_was_asked_for_meanwhile(tmp_path):
    trainer = make_trainer(tiny_model("mixtral").train(), tmp_path)
    watch = phb.watch(trainer)
    trainer.train()
    phb.patch(trainer.model, {"coef": 0.1})
    trainer.train()
    assert read_records(tmp_path).run["method"] == "phi"
    watch.stop()
    assert phb.get_balancer(trainer.model).config.coef == 0.1 and trainer.callback_handler.callbacks
    trainer.train()
    assert "moe/balance_loss" in trainer.state.log_history[1]


def test_a_method_that_changes_during_the_run_is_written(tmp_path):
    model = tiny_model("mixtral")
    watch = phb.watch(model, tmp_path)
    train(model, watch, 4)
    phb.patch(model, {"coef": 0.1})
    model(**tiny_batch(model)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    watch.log(5)
    found = read_records(tmp_path)
    assert found.run["method"] == "phi" and [row["step"] for row in found.rows] == [4, 5]


def test_watched_as_a_loop_but_given_to_a_trainer(tmp_path):
    model = tiny_model("mixtral").train()
    phb.watch(model, tmp_path)
    trainer = make_trainer(model, tmp_path)
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(RuntimeError, match=r"is for a loop of your own, .* Call phb.watch\(trainer\)"):
        trainer.train()
    assert trainer.callback_handler.callbacks == callbacks
    watch = phb.watch(trainer)
    trainer.train()
    assert len(read_records(tmp_path).rows) == 4
    watch.stop()
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(model)


def test_a_trainer_that_makes_its_model_anew(tmp_path):
    trainer = make_trainer(tiny_model("mixtral"), tmp_path)
    trainer.model_init = lambda: tiny_model("mixtral").train()
    with pytest.raises(ValueError, match="train\\(\\) will call `model_init`"):
        phb.watch(trainer)
    trainer.model_init = lambda: phb.patch(tiny_model("mixtral").train(), {"method": "none"})
    trainer.model = trainer.model_init()
    phb.watch(trainer)
    trainer.train()
    assert len(read_records(tmp_path).rows) == 4


def test_a_file_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    trainer = make_trainer(tiny_model("mixtral").train(), tmp_path)
    watch = phb.watch(trainer)
    watch.path.mkdir()
    trainer.train()
    (said,) = [record.getMessage() for record in caplog.records if "moe.jsonl" in record.getMessage()]
    assert f"{str(watch.path)!r} cannot be written ([Errno" in said and "its figures are lost until it can" in said
    assert trainer.state.global_step == 4 and "moe/max_vio" in trainer.state.log_history[3]


@pytest.mark.parametrize(
    "logging", [{"logging_steps": 3}, {"logging_steps": 500}, {"logging_strategy": "no"}], ids=str
)
def test_the_last_steps_are_written_though_they_are_not_logged(logging, tmp_path):
    trainer = make_trainer(tiny_model("mixtral").train(), tmp_path, **logging)
    phb.watch(trainer)
    trainer.train()
    rows = read_records(tmp_path).rows
    assert [row["step"] for row in rows] == ([3, 4] if logging.get("logging_steps") == 3 else [4])
    assert sum(row["steps"] for row in rows) == 4
    assert all({"confidence", "router"} <= layer.keys() for row in rows for layer in row["layers"].values())


def test_a_callback_may_stop_watching(tmp_path):
    trainer = make_trainer(tiny_model("mixtral").train(), tmp_path)
    watch, seen = phb.watch(trainer), []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            watch.stop()

    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    trainer.add_callback(Stop())
    trainer.add_callback(Other())
    trainer.train()
    assert seen == [1, 2, 3, 4]


def test_a_loop_that_resumes_says_its_step(tmp_path):
    model = tiny_model("mixtral")
    watch = phb.watch(model, tmp_path)
    train(model, watch, steps=12)
    watch.stop()
    again = phb.watch(model, tmp_path)
    model(**tiny_batch(model)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    again.log(9)
    assert [row["step"] for row in read_records(tmp_path).rows] == [4, 8, 9]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: phb.watch("model"), "`subject` must be a Trainer or a torch.nn.Module, got 'model'"),
        (lambda model: phb.watch(model, on_alert="stop"), "`on_alert` must be 'log' or 'raise', got 'stop'"),
        (lambda model: phb.watch(model, thresholds={"steps": 3}), "`thresholds` must be a watching.Thresholds, got"),
        (lambda model: phb.watch(tiny_model("llama")), "has no router"),
    ],
)
def test_wrong_arguments(call, message):
    model = tiny_model("mixtral")
    with pytest.raises((TypeError, ValueError), match=message):
        call(model)
    assert not hasattr(model, "phi_balance") and "_phi_balance_patch" not in vars(model.model)


# ---------------------------------------------------------------------- real trainings


def silence(model, experts):
    """Experts that a family's own bias never lets be chosen."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.e_score_correction_bias[experts] = -10.0


def poison(model):
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0] = math.nan


def stop_gradients(model):
    for layer in model.model.layers:
        layer.mlp.gate.weight.register_hook(torch.zeros_like)


FAULTS = {
    "dead_experts": ("deepseek_v3", lambda model: silence(model, [2]), {}),
    "collapsed_layer": ("deepseek_v3", lambda model: silence(model, slice(2, None)), {}),
    "not_finite": ("mixtral", poison, {}),
    "frozen": ("mixtral", lambda model: [layer.mlp.gate.requires_grad_(False) for layer in model.model.layers], {}),
    "no gradient": ("mixtral", stop_gradients, {}),
    "rounded": ("mixtral", lambda model: model.to(torch.bfloat16), {"lr": 1e-6}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_real_training_is_said(fault, tmp_path, caplog):
    model_type, spoil, options = FAULTS[fault]
    overrides = {"n_group": 1, "topk_group": 1} if model_type == "deepseek_v3" else {}
    model = tiny_model(model_type, **overrides)
    watch = phb.watch(model, tmp_path, thresholds=Thresholds(steps=12, false_alarm=1e-3))
    done = 8 if fault in ("dead_experts", "collapsed_layer") else 0
    train(model, watch, steps=done, **options)
    spoil(model)
    with caplog.at_level("WARNING"):
        train(model, watch, steps=done + 24, done=done, **options)
    kinds = {alert["alert"]["kind"] for alert in watch.alerts}
    assert (fault if "_" in fault else "unmoved_router") in kinds
    assert all(alert in read_records(tmp_path).alerts for alert in watch.alerts)
    reasons = {"frozen": "frozen while", "no gradient": "no gradient has reached", "rounded": "rounded away"}
    assert reasons.get(fault, fault) in str(watch.alerts)
    with pytest.raises(phb.RouterAlert, match=reasons.get(fault, fault)):
        again = phb.watch(model, on_alert="raise", thresholds=Thresholds(steps=12, false_alarm=1e-3))
        train(model, again, steps=24, **options)


HEALTHY = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HEALTHY)
def test_healthy_trainings_have_no_alarm(model_type):
    alarms = []
    for seed in range(2):
        model = tiny_model(model_type, seed)
        watch = phb.watch(model, thresholds=Thresholds(steps=10))
        train(model, watch, steps=30, every=3, seed=100 * seed)
        alarms += watch.alerts
    assert alarms == []


@pytest.mark.slow
def test_lora_without_routers_and_frozen_by_the_method_have_no_alarm():
    adapted = get_peft_model(tiny_model("mixtral"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for model in (adapted, phb.patch(tiny_model("mixtral"), {"method": "frozen"})):
        watch = phb.watch(model, thresholds=Thresholds(steps=5))
        train(model, watch, steps=15, every=3)
        assert not watch.alerts


def test_a_router_in_float32_inside_bf16_moves():
    model = phb.patch(tiny_model("mixtral", dtype=torch.bfloat16), {"method": "none", "fp32_routers": True})
    watch = phb.watch(model, thresholds=Thresholds(steps=5))
    train(model, watch, steps=12, lr=1e-6)
    assert not watch.alerts
