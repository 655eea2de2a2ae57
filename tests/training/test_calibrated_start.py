"""`attach(trainer, calibrate=N)` sets the means from the first batches, and changes nothing else."""

import pytest
import torch
from checks import assert_same
from training import TRAINERS, Recorder, make_trainer, patched, rows, weights
from transformers import Trainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


def run(folder, calibrate, cls=Trainer, coef=0.0, data=None, dropout=0.0, **arguments):
    """Trains without a price gradient unless `coef`, so that the weights show whether anything else has changed."""
    model = patched(coef=coef, bias_coef=0.0, model_args={"attention_dropout": dropout})
    trainer = make_trainer(model, folder, cls=cls, data=rows() if data is None else data, **arguments)
    recorder = Recorder(model)
    trainer.add_callback(recorder)
    phb.attach(trainer, calibrate=calibrate)
    trainer.train()
    return model, trainer, recorder


@pytest.mark.parametrize("cls", TRAINERS)
def test_batches_order_and_random_numbers_are_as_without_it(cls, tmp_path):
    """With shuffling, dropout, and an epoch that ends in the middle of a step: same batches, same weights."""
    cold = run(tmp_path / "cold", 0, cls, dropout=0.2, num_train_epochs=2)
    drawn = torch.rand(3)
    warm = run(tmp_path / "warm", 3, cls, dropout=0.2, num_train_epochs=2)
    assert torch.equal(torch.rand(3), drawn)
    assert len(warm[2].steps) == len(cold[2].steps) == 4
    for ours, theirs in zip(warm[2].steps, cold[2].steps):
        for left, right in zip(ours, theirs, strict=True):
            assert_same(left, right)
    assert_same(weights(warm[0]), weights(cold[0]))


def test_means_are_those_of_the_first_batches(tmp_path):
    """Solves m_1 = (1 - η) m_0 + η s_1 of the first optimizer step for m_0."""
    model, _, recorder = run(tmp_path, 4, max_steps=1)
    first = recorder.steps[0]
    reference = patched(coef=0.0)
    phb.calibrate(reference, first)
    step = patched(coef=0.0)
    balancer = phb.get_balancer(step)
    balancer.begin_step(first)
    for batch in first:
        step(**batch).loss.backward()
    balancer.step()
    for name, mean in phb.get_balancer(model).means().items():
        cold, warm = balancer.means()[name], phb.get_balancer(reference).means()[name]
        torch.testing.assert_close(mean, cold + 0.7 * (warm - 1 / 8), rtol=1e-4, atol=1e-6)
        assert (warm - 1 / 8).abs().max() > 0.01


def test_an_epoch_shorter_than_that_is_read_once(tmp_path):
    data = rows(5)
    cold, warm = (run(tmp_path / str(n), n, data=data, num_train_epochs=2) for n in (0, 50))
    assert_same(weights(warm[0]), weights(cold[0]))
    assert warm[1].state.global_step == cold[1].state.global_step


def test_resuming_goes_on_from_its_own_duals(tmp_path):
    straight = run(tmp_path / "straight", 3, coef=5.0, dropout=0.2, max_steps=4)[0]
    run(tmp_path / "cut", 3, coef=5.0, dropout=0.2, max_steps=2, save_strategy="steps", save_steps=2)
    model = patched(coef=5.0, bias_coef=0.0, model_args={"attention_dropout": 0.2})
    trainer = make_trainer(model, tmp_path / "cut", max_steps=4)
    phb.attach(trainer, calibrate=3)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(model), weights(straight))


@pytest.mark.parametrize("value", [-1, 2.5, "8"])
def test_number_of_batches_is_checked(value, tmp_path):
    with pytest.raises(ValueError, match="`calibrate` must be a number of batches"):
        phb.attach(make_trainer(patched(), tmp_path), calibrate=value)
