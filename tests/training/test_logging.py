"""A run logs `moe/...` of its steps and `eval_moe/...` of its evaluations, and is not changed by that."""

import math
from collections import Counter

import pytest
import torch
from checks import assert_same
from references import naive_figures, routed, routers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from training import TRAINERS, make_trainer, patched, rows, weights
from transformers import TrainerCallback

import hf_phibalance as phb
from hf_phibalance.balancing import counts as balancing_counts


pytestmark = pytest.mark.slow


class Loads(TrainerCallback):
    """`balancer.loads()` of every optimizer step, by step."""

    def __init__(self):
        self.by_step = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = phb.get_balancer(model).loads()


def figures(entry, prefix):
    return {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}


def assert_figures(logged, loads):
    """`logged` holds what follows from `loads`, `{layer: counts}`, by hand."""
    expected = naive_figures({name: [float(count) for count in counts] for name, counts in loads.items()})
    assert expected.keys() <= logged.keys()
    assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    tokens = sum(next(iter(loads.values()))) / 2  # top-2
    assert logged["tokens"] == tokens
    experts = len(next(iter(loads.values())))
    floor = math.sqrt((experts - 2) / (2 * tokens) * 2 * math.log(experts))
    assert logged["noise_floor"] == pytest.approx(floor, rel=1e-5)


def mean_figures(steps):
    """Means over `steps`, each `{layer: counts}`, of the figures by hand."""
    each = [naive_figures({name: counts.tolist() for name, counts in loads.items()}) for loads in steps]
    means = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
    # the worst layer is that of the greatest mean
    return means | {"max_vio_worst_layer": max(value for name, value in means.items() if "/" in name)}


@pytest.mark.parametrize("cls", TRAINERS)
def test_logged_figures_are_means_since_the_last_log_as_the_loss_is(cls, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = patched("qwen3_moe", bias_coef=0.05)
    loads = Loads()
    options = {"num_train_epochs": 3, "logging_steps": 2, "report_to": ["tensorboard"]}
    trainer = make_trainer(model, tmp_path, cls, callbacks=[loads], **options)
    callback = phb.attach(trainer, per_layer=16)
    balancer = phb.get_balancer(model)
    reads = []
    original = balancer.metrics

    def metrics(per_layer, steps):
        duals = (("price_range", balancer.prices()), ("bias_range", balancer.biases()))
        reads.append({name: max(float(v.max() - v.min()) for v in values.values()) for name, values in duals})
        return original(per_layer, steps)

    monkeypatch.setattr(balancer, "metrics", metrics)
    trainer.train()
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert list(entries) == [2, 4, 6] and len(reads) == 3  # the device is read when logging only
    for (step, entry), ranges in zip(entries.items(), reads):
        logged, window = figures(entry, "moe/"), [loads.by_step[step - 1], loads.by_step[step]]
        assert all(isinstance(value, (int, float)) for value in logged.values())
        expected = mean_figures(window)
        assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        tokens = [float(sum(next(iter(one.values()))) / 2) for one in window]  # top-2
        floors = [math.sqrt((8 - 2) / (2 * own) * 2 * math.log(8)) for own in tokens]
        assert logged["tokens"] == sum(tokens) / 2
        assert logged["noise_floor"] == pytest.approx(sum(floors) / 2, rel=1e-5)
        assert {name: logged[name] for name in ranges} == pytest.approx(ranges, rel=1e-6)
    assert not figures(trainer.state.log_history[-1], "moe/")  # the summary of the run

    (file,) = (tmp_path / "events").rglob("events.out.tfevents.*")  # reporters get all that the log has
    events = EventAccumulator(str(file)).Reload()
    written = {tag for tag in events.Tags()["scalars"] if tag.startswith("train/moe/")}
    assert written == {f"train/moe/{name}" for name in figures(entries[2], "moe/")}
    for tag in written:
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert values == pytest.approx({step: entry[tag.removeprefix("train/")] for step, entry in entries.items()})

    assert [entry["step"] for entry in callback.history] == [2, 4, 6]
    for entry in callback.history:
        for name, counts in loads.by_step[entry["step"]].items():
            both = counts + loads.by_step[entry["step"] - 1][name]
            assert entry["load"][name] == pytest.approx((both * len(both) / both.sum()).tolist())


def test_a_log_has_few_keys_and_each_is_explained(tmp_path):
    trainer = make_trainer(patched(bias_coef=0.05), tmp_path, max_steps=1)
    phb.attach(trainer)
    trainer.train()
    table = [
        line.split("|")[1].strip(" `") for line in balancing_counts.__doc__.splitlines() if line.startswith("| `")
    ]
    assert set(figures(trainer.state.log_history[0], "moe/")) == set(table) and len(table) == 10


def test_balance_loss_is_the_value_of_the_term(tmp_path):
    """coef · Σ_layers ⟨q, mean p⟩ at the prices of the step; with ema_rate 1 the mean of p is known."""
    model = patched(ema_rate=1.0)
    balancer = phb.get_balancer(model)
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=1, num_train_epochs=1)
    phb.attach(trainer)
    expected = []

    class Prices(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.prices = balancer.prices()

        def on_step_end(self, args, state, control, **kwargs):
            paid = [(self.prices[name] * mean).sum() for name, mean in balancer.means().items()]
            expected.append(balancer.config.coef * sum(paid).item())

    trainer.add_callback(Prices())
    trainer.train()
    logged = [entry["moe/balance_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert logged[0] == pytest.approx(0.0, abs=1e-5) and max(logged) > 0.1


@pytest.mark.parametrize(("layers", "per_layer"), [(2, 16), (18, 3), (18, 1)])
def test_layers_have_keys_of_their_own_if_asked(layers, per_layer, tmp_path):
    model = patched(model_args={"num_hidden_layers": layers})
    trainer = make_trainer(model, tmp_path, max_steps=1)
    phb.attach(trainer, per_layer=per_layer)
    trainer.train()
    shown = set(figures(trainer.state.log_history[0], "moe/max_vio/"))
    names = phb.get_balancer(model).layer_names
    assert len(names) == layers and len(shown) == min(layers, per_layer) and shown <= set(names)
    assert per_layer == 1 or {names[0], names[-1]} <= shown


# ---------------------------------------------------------------------- evaluation


def naive_loads(state, data):
    """`{layer: counts}` of an unpatched model with the weights `state` over `data`, row by row, so without padding."""
    twin = tiny_model("mixtral").eval()
    twin.load_state_dict(state)
    counts = {name: Counter() for name in routers(twin)}
    for row in data:
        with torch.no_grad(), routed(twin) as seen:
            twin(input_ids=torch.tensor([row["input_ids"]]))
        for name, ((_, chosen),) in seen.items():
            counts[name].update(chosen.flatten().tolist())
    return {name: [count[expert] for expert in range(8)] for name, count in counts.items()}


@pytest.mark.parametrize("cls", TRAINERS)
def test_evaluate_counts_the_evaluation_set(cls, tmp_path):
    """Before training as after it, on the set of the trainer, on another one, and under another prefix."""
    model, data, other = patched(), rows(7, seed=1), rows(4, shortest=2, seed=2)
    trainer = make_trainer(model, tmp_path, cls, eval_dataset=data, max_steps=2)
    phb.attach(trainer, per_layer=16)
    balancer = phb.get_balancer(model)
    for train in (False, True):
        if train:
            trainer.train()
        state = balancer.state_dict()
        assert_figures(figures(trainer.evaluate(), "eval_moe/"), naive_loads(model.state_dict(), data))
        assert_figures(figures(trainer.state.log_history[-1], "eval_moe/"), naive_loads(model.state_dict(), data))
        result = trainer.evaluate(other, metric_key_prefix="held_out")
        assert_figures(figures(result, "held_out_moe/"), naive_loads(model.state_dict(), other))
        assert not any(key.startswith(("moe/", "eval_moe/")) for key in result)
        assert "moe" not in " ".join(trainer.predict(trainer.eval_dataset).metrics)
        assert_same(balancer.state_dict(), state)


@pytest.mark.parametrize("cls", TRAINERS)
def test_evaluation_for_metrics_of_labelled_tokens(cls, tmp_path):
    """With `compute_metrics`, TRL forwards each batch again, without the labels that say which tokens count."""
    model, data = patched(token_mask="labels"), rows(7, seed=1)
    trainer = make_trainer(model, tmp_path, cls, eval_dataset=data)
    trainer.compute_metrics = lambda prediction: {"seen": len(prediction.predictions)}
    phb.attach(trainer, per_layer=16)
    result = trainer.evaluate()
    assert result["eval_seen"] == 7
    assert_figures(figures(result, "eval_moe/"), naive_loads(model.state_dict(), data))


class Weights(TrainerCallback):
    """Weights of the model after every optimizer step, by step."""

    def __init__(self):
        self.by_step = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = weights(model)


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_during_training_changes_nothing(several, tmp_path):
    """Weights, duals, prices and the logged balance of every step are bitwise those without evaluations."""
    data = {"short": rows(5, shortest=2, longest=4, seed=1), "long": rows(6, shortest=6, seed=2)}
    data = data if several else data["long"]
    runs = {}
    for evaluated in (True, False):
        model, record = patched(bias_coef=0.05), Weights()
        arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True} if evaluated else {}
        trainer = make_trainer(
            model, tmp_path, callbacks=[record], eval_dataset=data if evaluated else None, **arguments
        )
        phb.attach(trainer, per_layer=16)
        trainer.train()
        logged = [figures(entry, "moe/") for entry in trainer.state.log_history if "loss" in entry]
        balancer = phb.get_balancer(model)
        runs[evaluated] = record.by_step, balancer.state_dict(), balancer.prices(), logged, trainer.state.log_history
    for with_it, without in list(zip(runs[True], runs[False]))[:3]:
        assert_same(with_it, without)
    assert runs[True][3] == runs[False][3]

    initial = tiny_model("mixtral").state_dict()
    for prefix, rows_of in ((f"eval_{name}_moe/", data[name]) for name in data) if several else (("eval_moe/", data),):
        entries = {e["step"]: figures(e, prefix) for e in runs[True][4] if any(k.startswith(prefix) for k in e)}
        assert list(entries) == [0, 1, 2, 3, 4]
        # the selection bias is in force in an evaluation as well, so only the first one is that of the plain model
        assert_figures(entries[0], naive_loads(initial, rows_of))
        assert all(entry["tokens"] == entries[0]["tokens"] for entry in entries.values())
        assert entries[4]["max_vio"] != entries[0]["max_vio"]


def test_evaluation_uses_the_selection_bias(tmp_path):
    """A strong bias on two experts shows in the evaluation loads."""
    model = patched(coef=0.0, bias_coef=0.05)
    balancer = phb.get_balancer(model)
    biases = balancer.biases()
    for bias in biases.values():
        bias[:2] = 50.0
    balancer.set_biases(biases)
    trainer = make_trainer(model, tmp_path, eval_dataset=rows(3))
    phb.attach(trainer, per_layer=16)
    logged = figures(trainer.evaluate(), "eval_moe/")
    assert logged["max_vio"] == pytest.approx(3.0) and logged["dead_experts"] == 6 * len(balancer.layer_names)
