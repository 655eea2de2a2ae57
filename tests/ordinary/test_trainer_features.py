"""
Features of `TrainingArguments` and TRL: the declared coefficient arrives, each token counts once, and the duals move
once per optimizer step. Models are loaded with the flag, and nothing else of ours is called.

Each run is made with and without the flag.
"""

import copy
import dataclasses
import functools
import os
import subprocess
import sys
from itertools import cycle

import pytest
import torch
from datasets import Dataset
from measuring import (
    COEF,
    TOLERANCE,
    Watch,
    assert_declared,
    coefficients,
    loaded,
    ordinary,
    ordinary_scorer,
    priced,
    tokens_of,
)
from tiny import FIRST_PLAIN_ID
from torch import nn
from torch.utils.data import IterableDataset
from training import pad, tokenizer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.integrations import integration_utils
from transformers.trainer_utils import BestRun, HPSearchBackend
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_phibalance as phb


pytestmark = pytest.mark.slow


QUIET = {
    "learning_rate": 0.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
FIRST_ANSWER_ID = 64  # in some tests, smaller ids belong to the question and have no label


def rows(count, seed=0, shortest=4, longest=10):
    """Returns texts of unequal lengths: a question of small ids, then an answer of large ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, length):
        return torch.randint(low, high, (int(length),), generator=generator).tolist()

    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [
        {"input_ids": draw(FIRST_PLAIN_ID, FIRST_ANSWER_ID, n // 2) + draw(FIRST_ANSWER_ID, 128, n - n // 2)}
        for n in lengths
    ]


def pad_answers(examples):
    """Like `pad`, but only answers have labels."""
    batch = pad(examples)
    return batch | {"labels": batch["labels"].masked_fill(batch["input_ids"] < FIRST_ANSWER_ID, -100)}


def answers_of(inputs):
    return inputs["input_ids"] >= FIRST_ANSWER_ID


def make_trainer(
    model, folder, cls=Trainer, data=None, collate=pad, callbacks=(), evaluated=None, own=None, **options
):
    """Returns a quiet `Trainer`. `own` are its keywords, `options` those of its arguments."""
    arguments = TrainingArguments(str(folder), **{**QUIET, **options})
    own = {"train_dataset": rows(11) if data is None else data, "data_collator": collate, **(own or {})}
    if evaluated is not None:
        own["eval_dataset"] = evaluated
    return cls(model, arguments, callbacks=list(callbacks), **own)


def both(make, folder, family="mixtral", load=loaded, train=lambda trainer: trainer.train(), **config):
    """Returns the watched runs of `make(model, folder)`, with and without the flag."""
    watches = []
    for balanced in (True, False):
        model = load(family, balanced, **config)
        watch = Watch(model)
        trainer = make(model, folder / ("balanced" if balanced else "plain"))
        watch.trainer, trainer.watch = trainer, watch
        train(trainer)
        watches.append(watch.close())
    return watches


# ---------------------------------------------------------------------- runs that differ in arguments only


ARGUMENTS = {
    "plain": {},
    "accumulation with a remainder": {"gradient_accumulation_steps": 4, "num_train_epochs": 2},
    "drop_last": {"gradient_accumulation_steps": 2, "dataloader_drop_last": True},
    "length groups": {"gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length"},
    "clipping that does not bite": {"max_grad_norm": 1e9},
    "not averaged over devices": {"gradient_accumulation_steps": 3, "average_tokens_across_devices": False},
    "averaged over devices": {"gradient_accumulation_steps": 3, "average_tokens_across_devices": True},
    "input tokens seen": {"include_num_input_tokens_seen": "non_padding"},
    "checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "accumulation set in accelerate": {
        "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2, "sync_each_batch": True}}
    },
}
FAMILIES = {
    "accumulation with a remainder": "deepseek_v3",
    "checkpointing": "qwen3_moe",
    "label smoothing": "qwen3_moe",
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, tmp_path):
    options, family = {"num_train_epochs": 1, **ARGUMENTS[case]}, FAMILIES.get(case, "mixtral")

    def make(model, folder):
        return make_trainer(
            model, folder, **copy.deepcopy(options)
        )  # a Trainer removes entries of `accelerator_config`

    balanced, plain = both(make, tmp_path, family)
    assert_declared(balanced, plain, lambda: ordinary(family))
    per_step, sizes = plain.trainer.args.gradient_accumulation_steps, [len(step.forwards) for step in plain.steps]
    assert per_step == (2 if "accelerate" in case else options.get("gradient_accumulation_steps", 1)) == sizes[0]
    assert sum(sizes) == (5 if case == "drop_last" else 6 * options["num_train_epochs"])


def test_bf16(tmp_path):
    options = {"max_steps": 2, "bf16": True, "gradient_accumulation_steps": 2}
    found = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path)
    assert_declared(*found, tolerance=2e-2, rest=0.2, autocast=torch.bfloat16)


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adafactor", "rmsprop", "adagrad", "adamw_bnb_8bit", "lion_32bit"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(name, tmp_path):
    if "bnb" in name or "lion" in name:
        pytest.importorskip("bitsandbytes")
    options = {"optim": name, "max_steps": 2, "gradient_accumulation_steps": 2}
    assert_declared(*both(lambda model, folder: make_trainer(model, folder, **options), tmp_path))


def test_an_optimizer_of_the_users(tmp_path):
    """The model is balanced by `phb.patch`, not by the flag."""

    def load(family, balanced):
        model = loaded(family, False)
        return priced(phb.patch(model, {"coef": COEF})) if balanced else model

    def make(model, folder):
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return make_trainer(model, folder, own={"optimizers": (optimizer, scheduler)}, max_steps=2)

    assert_declared(*both(make, tmp_path, load=load))


# ---------------------------------------------------------------------- streams


class Stream(IterableDataset):
    """Rows without a length: `passes` times, or endless."""

    def __init__(self, data, endless=False):
        self.data, self.endless = data, endless

    def __iter__(self):
        return cycle(self.data) if self.endless else iter(self.data)


class Promised(Stream):
    """A stream that has fewer rows than it promises."""

    def __len__(self):
        return len(self.data) + 6


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_stream_without_an_end(accumulation, tmp_path):
    options = {"max_steps": 3, "gradient_accumulation_steps": accumulation, "data": Stream(rows(11), endless=True)}
    assert_declared(*both(lambda model, folder: make_trainer(model, folder, **options), tmp_path))


def test_a_stream_of_several_passes(tmp_path, warned):
    """
    A pass has six batches, a step four. If a step crosses the end of a pass, its first batches have gone backward
    before the rest are drawn. There 5% error is allowed. Everywhere else the coefficient is exact, so nothing warns.
    """
    options = {"max_steps": 4, "gradient_accumulation_steps": 4, "data": Stream(rows(12))}
    balanced, plain = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path)
    sizes = [len(step.forwards) for step in plain.steps]
    assert sizes == [4, 6, 6, 6] and balanced.moves == 4
    for size, (ratio, rest) in zip(sizes, coefficients(balanced, plain)):
        allowed = TOLERANCE if size == 4 else 5e-2
        assert abs(ratio - 1) < allowed and rest < 5 * allowed, (sizes, ratio, rest)
    counted = [sum(int(tokens_of(f["inputs"]).sum()) for f in step.forwards) for step in plain.steps]
    assert [step.logged for step in balanced.steps] == counted
    assert not warned.about("another coefficient")


def test_a_loader_that_ends_before_its_length(tmp_path):
    """Three batches are missing, so the last step of a pass has fewer micro-batches than expected."""
    options = {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "data": Promised(rows(12))}
    balanced, plain = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path)
    assert_declared(balanced, plain)
    assert len(plain.steps) == 3


# ---------------------------------------------------------------------- losses


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return loss / num_items_in_batch


class Weighted(Trainer):
    """Removes its own column from the batch, and weights texts by it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight, labels = inputs.pop("weight"), inputs.pop("labels")
        logs = model(**inputs).logits[:, :-1].log_softmax(-1)
        losses = nn.functional.nll_loss(logs.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return (losses.view(len(weight), -1).sum(-1) * weight).sum() / num_items_in_batch


def pad_weighted(examples):
    return pad_answers(examples) | {"weight": torch.tensor([float(len(e["input_ids"])) for e in examples])}


class Twice(Trainer):
    """Runs two forwards per batch, as R-Drop does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        once = functools.partial(super().compute_loss, model, num_items_in_batch=num_items_in_batch)
        return (once(dict(inputs)) + once(dict(inputs))) / 2


LOSSES = {
    "the model's": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"own": {"compute_loss_func": own_loss}},
    "a subclass with a column": {"cls": Weighted, "collate": pad_weighted, "remove_unused_columns": False},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask", ["attention", "labels"])
def test_losses_and_the_tokens_that_count(loss, mask, tmp_path):
    """With `token_mask="labels"` tokens with labels count, even if the model does not get the labels."""
    options = {"collate": pad_answers, "max_steps": 2, "gradient_accumulation_steps": 2, **LOSSES[loss]}
    found = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path, token_mask=mask)
    assert_declared(*found, counts=answers_of if mask == "labels" else tokens_of)


class Sharp(Trainer):
    """Trains on each batch twice and drops the first gradient, as SAM does, or after an error."""

    def training_step(self, model, *args, **kwargs):
        super().training_step(model, *args, **kwargs)
        model.zero_grad()
        self.watch.forget()
        return super().training_step(model, *args, **kwargs)


def test_a_batch_that_is_trained_on_anew(tmp_path):
    def make(model, folder):
        return make_trainer(model, folder, cls=Sharp, max_steps=2)

    assert_declared(*both(make, tmp_path))


class Dies(Trainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        raise KeyboardInterrupt


def test_a_trainer_that_died_leaves_no_step_behind(tmp_path):
    """Another loop may go on with the model."""
    model = loaded("mixtral", True)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, tmp_path, cls=Dies, gradient_accumulation_steps=2).train()
    assert phb.get_balancer(model).now.settled == 0 and phb.get_balancer(model).now.number is None


def test_two_forwards_of_each_batch(tmp_path):
    """Each batch gets its share of the coefficient, with any number of forwards per backward."""
    options = {"cls": Twice, "max_steps": 2, "gradient_accumulation_steps": 2}
    balanced, plain = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path)
    assert [len(step.forwards) for step in plain.steps] == [4, 4] and balanced.moves == 2
    for ratio, rest in coefficients(balanced, plain):
        assert abs(ratio - 1) < TOLERANCE and rest < 5 * TOLERANCE


# ---------------------------------------------------------------------- evaluation


EVALUATIONS = {
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "no"},
    "every step": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_accumulation_steps": 1},
    "every epoch, with metrics": {"eval_strategy": "epoch", "batch_eval_metrics": True},
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluation_neither_counts_nor_pays(case, tmp_path):
    metrics = {"compute_metrics": lambda prediction, compute_result=False: {}} if "metrics" in case else None
    options = {"evaluated": rows(5, seed=1), "num_train_epochs": 2, "gradient_accumulation_steps": 4, "own": metrics}
    options |= EVALUATIONS[case]
    found = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path)
    assert_declared(*found)
    assert any("eval_loss" in entry for entry in found[0].trainer.state.log_history)


class StepsAfter(TrainerCallback):
    """Records the balancer's step count and state after each step."""

    def __init__(self):
        self.steps, self.states = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        balancer = phb.get_balancer(model)
        self.steps.append(balancer.steps)
        self.states.append(balancer.state_dict())


def test_the_best_model_comes_back_with_its_duals(tmp_path):
    """Losses only rise, so the first checkpoint is the best. After training the duals are those of that checkpoint."""
    states, losses = StepsAfter(), iter(range(100))

    def make(model, folder):
        callbacks = [states] if folder.name == "balanced" else []
        metrics = {"compute_metrics": lambda prediction: {"rising": next(losses)}}
        every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "rising", "greater_is_better": False}
        evaluated = rows(4, seed=1)
        return make_trainer(
            model, folder, callbacks=callbacks, evaluated=evaluated, own=metrics, max_steps=3, **every, **best
        )

    balanced, plain = both(make, tmp_path)
    assert_declared(balanced, plain, moves=1)
    assert states.steps == [1, 2, 3]
    best = balanced.trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    after = balanced.balancer.state_dict()
    assert after.keys() == states.states[0].keys()
    assert all(torch.equal(after[name], states.states[0][name]) for name in after)


def test_early_stopping(tmp_path):
    """The loss never improves, so training ends after three evaluations."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    options = {"evaluated": rows(4, seed=1), "max_steps": 9, "gradient_accumulation_steps": 2, **every}

    def make(model, folder):
        return make_trainer(model, folder, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], **options)

    balanced, plain = both(make, tmp_path)
    assert_declared(balanced, plain)
    assert len(plain.steps) == 3


# ---------------------------------------------------------------------- several trainings


def fail_once(model, watch):
    """Memory runs out in the second forward of the first try, after a backward."""
    calls = []

    def hook(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 2:
            watch.forget()
            raise RuntimeError("CUDA out of memory. (made up)")

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def test_auto_find_batch_size(tmp_path):
    """The failed step is dropped. The smaller batches are balanced exactly."""
    sizes = []
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    watches = []
    for balanced in (True, False):
        model = loaded("mixtral", balanced)
        watch = Watch(model)
        sizes.append(fail_once(model, watch))
        make_trainer(model, tmp_path / str(balanced), data=rows(24), max_steps=2, **options).train()
        watches.append(watch.close())
    assert sizes[0] == sizes[1] and sizes[0][:2] == [4, 4] and 1 < sizes[0][2] < 4 and len(sizes[0]) == 6
    assert_declared(*watches)


class Trial(dict):
    """The part of an optuna trial that the Trainer reads."""

    def __init__(self, number, **params):
        super().__init__(params)
        self.number, self.params = number, params


class Listed(HyperParamSearchBackendBase):
    """Tries the values of a list, calling the same methods for a trial as optuna's backend."""

    name = "optuna"

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, **kwargs):
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=Trial(number, gradient_accumulation_steps=number + 1))
            trainer.model_wrapped = trainer.model = None  # as optuna's backend does for the next trial
            trainer.accelerator.clear()
        return BestRun("0", 0.0, {})


def test_hyperparameter_search(tmp_path, monkeypatch):
    """Each trial makes a new model inside `train`. Its balancer starts anew."""
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Listed)
    monkeypatch.setattr(integration_utils, "is_ray_tune_available", lambda: True)  # so that a dict is a trial
    runs = {True: [], False: []}
    for balanced, watches in runs.items():

        def init():
            watches.append(Watch(loaded("mixtral", balanced)))  # noqa: B023 (it is called before the next turn)
            return watches[-1].model  # noqa: B023

        trainer = make_trainer(None, tmp_path / str(balanced), own={"model_init": init}, num_train_epochs=1)
        trainer.hyperparameter_search(lambda trial: trial.params, n_trials=2, backend="optuna")
    runs = [[watch.close() for watch in watches if watch.steps] for watches in runs.values()]
    assert [len(watch.steps) for watch in runs[1]] == [6, 3]
    for watched, plain in zip(*runs):
        assert_declared(watched, plain)


@pytest.mark.parametrize(
    ("at", "skips_data"),
    [(2, True), (2, False), (3, True)],
    ids=["in the middle of an epoch", "ignore_data_skip", "at the end of an epoch"],
)
def test_resumed(at, skips_data, tmp_path):
    """
    A new model resumes with exact steps. It gets the same data and ends with the same duals as an uninterrupted run,
    unless `ignore_data_skip` restarts the epoch.
    """
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": at}
    options |= {"data": rows(12), "ignore_data_skip": not skips_data}

    def make(model, folder):
        return make_trainer(model, folder, **options)

    whole = both(make, tmp_path)
    for watch in whole:
        watch.uninterrupted = watch.balancer and watch.balancer.state_dict()

    def resume(trainer):
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{at}")

    balanced, plain = both(make, tmp_path, train=resume)
    assert len(plain.steps) == 6 - at
    assert_declared(balanced, plain, moves=6)
    if skips_data:
        for step, same in zip(balanced.steps, whole[0].steps[at:]):
            assert all(torch.equal(step.gradients[name], gradient) for name, gradient in same.gradients.items())
        after = balanced.balancer.state_dict()
        assert all(torch.equal(after[name], value) for name, value in whole[0].uninterrupted.items())


def test_a_second_training_goes_on(tmp_path):
    """Calls `train` twice on one trainer, then on a second trainer of the model. The duals continue."""

    def make(model, folder):
        return make_trainer(model, folder, max_steps=2, gradient_accumulation_steps=2)

    def train(trainer):
        trainer.train()
        trainer.train()
        make(trainer.model, trainer.args.output_dir).train()

    balanced, plain = both(make, tmp_path, train=train)
    assert len(plain.steps) == 6
    assert_declared(balanced, plain)


IN_A_PROCESS = """
import sys
from pathlib import Path
from measuring import assert_declared
from test_trainer_features import both, make_trainer
options = {"max_steps": 2, "gradient_accumulation_steps": 2}
assert_declared(*both(lambda model, folder: make_trainer(model, folder, **options), Path(sys.argv[1])))
"""


def test_the_flag_is_enough_in_a_fresh_process(tmp_path):
    """No import or call of another test helps."""
    command, path = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path)], os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_attach_before_train_changes_nothing(tmp_path):
    """Calls `phb.attach`, as for its options, in addition to `train`. Nothing counts twice."""

    def make(model, folder):
        trainer = make_trainer(model, folder, max_steps=2, gradient_accumulation_steps=2)
        if folder.name == "balanced":
            phb.attach(trainer)
        return trainer

    assert_declared(*both(make, tmp_path))


SCHEDULES = {
    "linear": [1, 2 / 3, 1 / 3, 0, 0],
    "cosine": [1, 0.75, 0.25, 0, 0],
    "off": [1, 1, 1, 0, 0],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_coefficient_follows_its_schedule(schedule, tmp_path):
    """Checks three optimizer steps of several micro-batches. The duals keep moving after the schedule ends."""
    options = {"max_steps": 5, "gradient_accumulation_steps": 2}
    config = {"schedule": schedule, "schedule_steps": 3}
    balanced, plain = both(lambda model, folder: make_trainer(model, folder, **options), tmp_path, **config)
    for (ratio, rest), expected in zip(coefficients(balanced, plain), SCHEDULES[schedule], strict=True):
        assert abs(ratio - expected) < TOLERANCE and rest < 5 * TOLERANCE
    assert balanced.moves == 5


# ---------------------------------------------------------------------- fp16


class Overflow(TrainerCallback):
    def __init__(self, watch):
        self.watch = watch

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            self.watch.forget()


@pytest.mark.parametrize("overflows", [False, True])
def test_fp16_scales_the_loss(overflows, tmp_path):
    """Uses the scaler of accelerate for fp16, which it refuses on a CPU. A skipped step moves nothing."""
    watches = []
    for balanced in (True, False):
        model = loaded("mixtral", balanced)
        watch = Watch(model)
        callbacks = [Overflow(watch)] if overflows else []
        options = {"max_steps": 3, "gradient_accumulation_steps": 2}
        trainer = make_trainer(model, tmp_path / str(balanced), callbacks=callbacks, **options)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.train()
        watches.append(watch.close())
    assert len(watches[1].steps) == (2 if overflows else 3)
    assert_declared(*watches)


# ---------------------------------------------------------------------- TRL


def trl_arguments(cls, folder, **options):
    defaults = {**QUIET, "max_steps": 2, "gradient_accumulation_steps": 2, "bf16": False}
    if "router_aux_loss_coef" in {field.name for field in dataclasses.fields(cls)}:
        defaults["router_aux_loss_coef"] = 0.0
    return cls(str(folder), **{**defaults, **options})


SFT = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False, "family": "deepseek_v3"},
    "answers only": {"completion_only_loss": True, "token_mask": "labels"},
    "packed": {"packing": True, "max_length": 16},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding-free": {"padding_free": True, "pad_to_multiple_of": 32, "max_length": None, "family": "qwen3_moe"},
    "streamed": {"stream": True},
}


@pytest.mark.parametrize("case", SFT)
def test_sft(case, tmp_path):
    options = dict(SFT[case])
    family, mask = options.pop("family", "mixtral"), options.pop("token_mask", "attention")
    data = Dataset.from_list(rows(32))
    if mask == "labels":
        data = data.map(lambda row: {"completion_mask": [int(i >= FIRST_ANSWER_ID) for i in row["input_ids"]]})
    if options.pop("stream", False):
        data = data.to_iterable_dataset()

    def make(model, folder):
        arguments = trl_arguments(SFTConfig, folder, **options)
        return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())

    found = both(make, tmp_path, family, token_mask=mask)
    assert_declared(*found, lambda: ordinary(family), counts=answers_of if mask == "labels" else tokens_of)


def preferences(count):
    texts, names = [row["input_ids"] for row in rows(3 * count, seed=2)], ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([dict(zip(names, texts[i : i + 3])) for i in range(0, len(texts), 3)])


def words(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 2}, {"precompute_ref_log_probs": True}],
    ids=["one micro-batch", "two micro-batches", "reference computed before"],
)
def test_dpo(options, tmp_path):
    data = [{name.removesuffix("_ids"): words(ids) for name, ids in row.items()} for row in preferences(8)]

    def make(model, folder):
        arguments = trl_arguments(DPOConfig, folder, **options)
        return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer())

    assert_declared(*both(make, tmp_path))


def test_reward_pairs(tmp_path):
    data = preferences(8).remove_columns("prompt_ids")

    def load(family, balanced):
        scorer = ordinary_scorer(family)
        return priced(phb.patch(scorer, {"coef": COEF})) if balanced else scorer

    def make(model, folder):
        arguments = trl_arguments(RewardConfig, folder)
        return RewardTrainer(model, args=arguments, train_dataset=copy.deepcopy(data), processing_class=tokenizer())

    assert_declared(*both(make, tmp_path, load=load), ordinary_scorer)


def variety(completions, **kwargs):
    return [float(len(set(completion.split()))) for completion in completions]


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "beta": 0.1}], ids=["once", "twice, with a reference"])
def test_grpo(options, tmp_path):
    """Rollouts neither count nor get prices. The tokens of a step are those of prompts and completions."""
    prompts = Dataset.from_list([{"prompt": words(row["input_ids"])} for row in rows(8)])

    def make(model, folder):
        generated = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0}
        arguments = trl_arguments(GRPOConfig, folder, **generated, **options)
        return GRPOTrainer(model, variety, args=arguments, train_dataset=prompts, processing_class=tokenizer())

    assert_declared(*both(make, tmp_path))
