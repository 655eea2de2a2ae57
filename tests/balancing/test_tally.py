"""What is counted over the tokens of one step after another, and of which batches it need not be counted twice."""

import copy
import pickle

import pytest
import torch
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.balancing.tally import PAGES, StepTally


SIZES = [4, 6]


def fill(tally, value):
    tally.flat.fill_(value)
    return tally.flat[: tally.shared].clone()


@pytest.mark.parametrize("bins", [0, 5])
def test_every_step_starts_from_nothing_and_the_last_one_stays(bins):
    tally = StepTally(SIZES, bins)
    for step in range(2 * PAGES + 3):
        assert not tally.flat.any() and len(tally.flat) == (2 + bins) * 10 + 3
        assert tally.flat.data_ptr() % 16 == 0
        expected = fill(tally, step + 1.0)
        done = tally.turn()
        fill(tally, -1.0)  # of the step after it, which is given up
        assert torch.equal(done, expected)
        tally.flat.zero_()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bins", [0, 5])
def test_whatever_is_not_finite_closes_all_routers(value, bins):
    """Wherever it is, but in the number of replays: no sum exceeds the bounds."""
    tally = StepTally(SIZES, bins)
    for place in {*range(len(tally.flat))} - {tally.shared - 1}:
        tally.flat.fill_(1.0)
        tally.replayed.zero_()
        assert tally.bounds().tolist() == [0, 0]
        tally.flat[place] = value
        assert tally.bounds().isnan().all()
    tally.flat.fill_(3.0)
    below, above = (
        tally.bounds().tolist()
    )  # three replays: the means move, biases do not, whatever the number of tokens
    assert below == 0 and above > 1e20


def test_autocast_takes_no_large_number_for_infinite():
    tally = StepTally(SIZES)
    tally.flat[0] = 1e30
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert tally.bounds().tolist() == [0, 0]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda tally: pickle.loads(pickle.dumps(tally))], ids=["copy", "pickle"]
)
def test_steps_that_were_not_finite_are_counted(copied):
    """Over all pages, up to the step under way; a copy goes on for itself."""
    tally, bad = StepTally(SIZES), 0
    for step in range(3 * PAGES):
        is_bad = step % 7 == 3
        fill(tally, float("nan") if is_bad else 1.0)
        assert step % 50 or tally.count_not_finite() == bad
        tally.turn()
        bad += is_bad
        if step == PAGES + 10:
            tally = copied(tally)
    fill(tally, float("inf"))
    assert tally.count_not_finite() == bad
    tally.turn()
    assert tally.count_not_finite() == bad + 1


# ---------------------------------------------------------------------- batches that were announced


def in_place(batch):
    batch["attention_mask"][:, -2:] = 0
    batch["labels"][:, -2:] = -100
    return batch


def shape(batch):
    """As if the first columns of the mask were of what is in a cache."""
    return {**batch, "input_ids": batch["input_ids"][:, 2:], "labels": batch["labels"][:, 2:]}


@pytest.mark.parametrize(
    "changed", [lambda batch: batch, in_place, shape, copy.deepcopy], ids=["no", "values", "shape", "copy"]
)
@pytest.mark.parametrize("token_mask", ["attention", "labels", "all"])
def test_what_has_changed_since_it_was_announced_is_counted_anew(changed, token_mask):
    """What counts are the tokens that the forward sees."""
    model = phb.patch(tiny_model("mixtral").train(), {"token_mask": token_mask})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    balancer.begin_step([batch])
    seen = changed(batch)
    counts = {
        "attention": seen["attention_mask"][:, -seen["input_ids"].shape[1] :] != 0,
        "labels": seen["labels"] != -100,
        "all": torch.ones_like(seen["input_ids"]),
    }
    with balancer.labels_of(seen["labels"]):
        balancer.meter.open_forward(seen, training=True)
    assert balancer._steps.tally.tokens == counts[token_mask].sum()
    assert torch.equal(balancer.meter._tokens.mask, counts[token_mask].flatten().float())
    balancer.meter.close_forward()
