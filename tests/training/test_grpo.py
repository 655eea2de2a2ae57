"""trl's GRPO and RLOO: steps whose text is generated after they have begun get the exact coefficient; replayed choices are counted."""

from collections import Counter

import pytest
import torch
from charging import COEF, collect
from checks import assert_same
from datasets import Dataset
from references import phi_loss, routers
from replay import Rollouts, replayed
from steps import assert_gradient, build, difference, loss_gradient
from tiny import set_prices, tiny_model
from training import tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
}
REPLAYED_STEPS = 3


def make_trainer(cls, model, folder, prompts, **options):
    args = (GRPOConfig if cls is not RLOOTrainer else RLOOConfig)(str(folder), **QUIET, **options)
    return cls(
        model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer(),
    )


class Steps(TrainerCallback):
    """Notes what the model was trained on in each optimizer step, and the gradient that the optimizer received."""

    def __init__(self, model):
        self.fed, self.gradients, self._model = [[]], [], model
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if torch.is_grad_enabled() and model.training:
            self.fed[-1].append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask", "labels")})

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradients.append(collect(self._model))
        self.fed.append([])


def trained(folder, cls, coef, steps=1, token_mask="attention", accumulation=4, **options):
    """Trains with known prices and a tiny learning rate. Returns the steps, the means, and the report on the first step."""
    torch.manual_seed(0)
    model = build("mixtral")
    prompts = [" ".join(f"w{3 + (row + i) % 9}" for i in range((1, 3, 20, 9)[row % 4])) for row in range(16)]
    trainer = make_trainer(
        cls,
        model,
        folder,
        prompts,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_generations=2,
        max_completion_length=8,
        generation_kwargs={"sequence_bias": [[[2], 3.0]]},  # so that many end early
        learning_rate=1e-12,
        optim="sgd",
        router_aux_loss_coef=0.0,
        beta=0.0,
        max_grad_norm=0.0,
        **options,
    )
    phb.patch(model, {"coef": coef, "ema_rate": 1e-4, "token_mask": token_mask})
    seen = Steps(model)
    trainer.add_callback(seen)
    callback = phb.attach(trainer, verify=coef > 0)
    means = set_prices(model).means()
    trainer.train()
    return seen, means, callback.report


@pytest.mark.parametrize(
    "cls, options",
    [
        (GRPOTrainer, {}),
        (RLOOTrainer, {}),
        (GRPOTrainer, {"token_mask": "labels"}),
        (GRPOTrainer, {"steps_per_generation": 8, "accumulation": 2, "num_iterations": 2, "steps": 3}),
    ],
    ids=["grpo", "rloo", "labels", "several_steps_a_generation"],
)
def test_unequal_micro_batches_are_exact(cls, options, tmp_path, warned):
    priced, means, report = trained(tmp_path, cls, COEF, **options)
    plain, _, _ = trained(tmp_path, cls, 0.0, **options)
    mask = "labels" if options.get("token_mask") == "labels" else "attention_mask"
    assert len(priced.gradients) == len(plain.gradients) == options.get("steps", 1)
    losses = [(COEF, phi_loss(means, "previous"))]
    for number, batches in enumerate(priced.fed[:-1]):
        assert len(batches) == options.get("accumulation", 4)
        for batch, other in zip(batches, plain.fed[number]):
            assert_same(batch, other)
        added = difference(priced.gradients[number], plain.gradients[number])
        expected = loss_gradient(build("mixtral"), batches, losses, token_mask=mask)
        assert_gradient(added, expected, tolerance=2e-2 if number else 1e-4)  # later prices have moved a little
        if number == 0:
            shares = [1 / len(batches)] * len(batches)
            own_means = loss_gradient(build("mixtral"), batches, losses, shares, token_mask=mask)
            with pytest.raises(AssertionError):
                assert_gradient(added, own_means, tolerance=1e-2)
    assert abs(report.coefficient.ratio - 1) < 1e-4 and report.coefficient.residual < 1e-4
    assert not report.problems and not warned.about("its own mean")


def test_generated_in_the_middle_of_a_step(tmp_path, warned):
    """The rest of the step is not known when it begins: each micro-batch gets its own mean, and a warning says so."""
    _, _, report = trained(tmp_path, GRPOTrainer, COEF, steps_per_generation=2)
    assert warned.about("steps_per_generation is a multiple of gradient_accumulation_steps")
    assert not report.problems and abs(report.coefficient.ratio - 1) > 1e-3
    (check,) = (check for check in report.checks if check.name == "coefficient")
    assert check.status == "warning" and "its own mean" in check.finding


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_grpo_replays_its_rollouts(model_type, tmp_path):
    """The policy update replays the experts that the routers chose during generation, as `replaying()` describes it."""
    model = tiny_model(model_type).train()
    rollouts, updates, loads = Rollouts(model), [], []

    class ReplayingTrainer(GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).flatten().bool()
            choices = rollouts.of(ids)
            updates.append((mask, choices))
            with phb.get_balancer(model).replaying(), replayed(model, choices):
                return super().compute_loss(model, inputs, *args, **kwargs)

    class Loads(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            loads.append(phb.get_balancer(model).loads())

    trainer = make_trainer(
        ReplayingTrainer,
        model,
        tmp_path,
        ["w10 w11 w12 w13"] * 8,
        max_steps=REPLAYED_STEPS,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=5,
        generation_kwargs={"min_new_tokens": 5},
        learning_rate=0.1,
    )
    balancer = phb.get_balancer(phb.patch(model, {"coef": 0.05, "bias_coef": 0.02}))
    phb.attach(trainer)
    trainer.add_callback(Loads())
    balancer.set_biases(
        {site.name: torch.linspace(-0.2, 0.2, 8) for site in balancer.sites}
    )  # as after a pre-training
    biases, prices = balancer.biases(), balancer.prices()
    native = {name: r.e_score_correction_bias.clone() for name, r in routers(model).items() if model_type != "mixtral"}
    trainer.train()

    assert len(updates) == len(loads) == REPLAYED_STEPS == balancer.steps
    for (mask, choices), load in zip(updates, loads):
        for name, chosen in choices.items():
            found = Counter(chosen[mask].flatten().tolist())
            assert load[name].tolist() == [float(found[e]) for e in range(8)]
    assert_same(balancer.biases(), biases)
    assert all(torch.equal(routers(model)[name].e_score_correction_bias, bias) for name, bias in native.items())
    assert all(not torch.equal(price, prices[name]) for name, price in balancer.prices().items())
    logged = [entry["moe/tokens"] for entry in trainer.state.log_history if "moe/tokens" in entry]
    assert logged == [float(mask.sum()) for mask, _ in updates]
