"""GRPO and RLOO: what a step trains on is generated after it has begun, in micro-batches of unequal length, and priced exactly."""

import pytest
import torch
from charging import COEF, collect
from checks import assert_same
from datasets import Dataset
from references import phi_loss
from steps import assert_gradient, build, difference, loss_gradient
from tiny import set_prices
from training import tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import hf_phibalance as phb


class Steps(TrainerCallback):
    """What the model was trained on in each optimizer step, and the gradient that the optimizer received."""

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
    """Trains with known prices, and a learning rate so small that nothing else moves; what each step was, and the report on it."""
    torch.manual_seed(0)
    model = build("mixtral")
    prompts = [" ".join(f"w{3 + (row + i) % 9}" for i in range((1, 3, 20, 9)[row % 4])) for row in range(16)]
    trainer = cls(
        model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=(GRPOConfig if cls is GRPOTrainer else RLOOConfig)(
            str(folder),
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            num_generations=2,
            max_completion_length=8,
            generation_kwargs={"sequence_bias": [[[2], 3.0]]},  # so that many end early
            gradient_checkpointing=False,
            learning_rate=1e-12,
            optim="sgd",
            router_aux_loss_coef=0.0,
            beta=0.0,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer(),
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
    count = options.get("steps", 1)
    assert len(priced.gradients) == len(plain.gradients) == count
    for number in range(count):
        batches = priced.fed[number]
        assert len(batches) == options.get("accumulation", 4)
        for batch, other in zip(batches, plain.fed[number]):
            assert_same(batch, other)
        expected = loss_gradient(build("mixtral"), batches, [(COEF, phi_loss(means, "previous"))], token_mask=mask)
        shares = [1 / len(batches)] * len(batches)
        own_means = loss_gradient(
            build("mixtral"), batches, [(COEF, phi_loss(means, "previous"))], shares, token_mask=mask
        )
        added = difference(priced.gradients[number], plain.gradients[number])
        if number == 0:  # the prices of later ones have moved a little
            assert_gradient(added, expected)
            with pytest.raises(AssertionError):
                assert_gradient(added, own_means, tolerance=1e-2)
        else:
            assert_gradient(added, expected, tolerance=2e-2)
    assert abs(report.coefficient.ratio - 1) < 1e-4 and report.coefficient.residual < 1e-4
    assert not report.problems and not warned.about("its own mean")


def test_generated_in_the_middle_of_a_step(tmp_path, warned):
    """Then the rest is not known when it begins: charged as before, and said with the remedy."""
    _, _, report = trained(tmp_path, GRPOTrainer, COEF, steps_per_generation=2)
    assert warned.about("steps_per_generation is a multiple of gradient_accumulation_steps")
    assert not report.problems and abs(report.coefficient.ratio - 1) > 1e-3
    (check,) = (check for check in report.checks if check.name == "coefficient")
    assert check.status == "warning" and "its own mean" in check.finding
