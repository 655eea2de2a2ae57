"""Two real ranks of which one has trouble: both do the same, nothing hangs, and the coefficient stays what it is."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from charging import COEF, collect
from checks import assert_same
from invariance import in_ranks
from references import phi_loss
from shifted import shifted
from steps import SHAPES, assert_gradient, build, difference, loss_gradient, micro_batches
from tiny import set_prices, tiny_batch
from training import make_trainer, patched, rows
from transformers import TrainerCallback

import hf_phibalance as phb


pytestmark = pytest.mark.slow


BIASED = {"coef": COEF, "bias_coef": 0.1}
TROUBLES = {
    "nan": (torch.nan, BIASED),
    "inf": (torch.inf, BIASED),
    "nan_where_only_loads_are_kept": (torch.nan, {"coef": 0.0, "bias_coef": 0.1, "track": "load"}),
}


def plain(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def step(model, batches, items, skipped=None):
    """An optimizer step as a `Trainer` runs it: the sum of the losses over `items` tokens; returns its gradients."""
    model.zero_grad()
    balancer = phb.get_balancer(model)
    balancer.begin_step(batches)
    for batch in batches:
        model(**batch, num_items_in_batch=torch.tensor(items)).loss.backward()
    balancer.step(skipped)
    return collect(model)


def on_each_rank(folder):
    return {
        "trouble": in_trouble(),
        "replay": replaying_on_one(),
        "uneven": on_uneven_ranks(),
        "scaler": with_scaler(folder),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found; the processes are started once."""
    return in_ranks(on_each_rank, 2, str(tmp_path_factory.mktemp("trainer")))


# ---------------------------------------------------------------------- one rank diverges, or skips


def in_trouble():
    """Each trouble: the duals before it, after it, and after an ordinary step."""
    results = {}
    for case, (value, config) in TROUBLES.items():
        model = phb.patch(build("mixtral"), config)
        balancer, rank = phb.get_balancer(model), dist.get_rank()
        states = results[case] = []
        for turn in range(3):
            good, bad = micro_batches(model, SHAPES[:2], seed=10 * turn + rank)
            balancer.begin_step([good, bad])
            model(**good).loss.backward()
            if turn == 1 and rank == 1:
                with shifted(model, 3, by=value):
                    model(**bad).loss.backward()
            else:
                model(**bad).loss.backward()
            model.zero_grad()
            balancer.step()
            states.append(plain(balancer.state_dict()))
    model = phb.patch(build("mixtral"), BIASED)
    states = results["skipped"] = []
    for turn in range(3):
        batches = micro_batches(model, SHAPES[:2], seed=10 * turn + dist.get_rank())
        step(model, batches, 30, skipped=turn == 1 and dist.get_rank() == 1)
        states.append(plain(phb.get_balancer(model).state_dict()))
    return results


def test_what_one_rank_suffers_moves_nothing_on_any(ranks):
    for case in (*TROUBLES, "skipped"):
        first, second = (
            [{k: torch.from_numpy(v) for k, v in state.items()} for state in rank["trouble"][case]] for rank in ranks
        )
        for left, right in zip(first, second):
            assert_same(left, right)
        before, after, later = ({k: v for k, v in state.items() if k != "steps"} for state in first)
        assert_same(after, before)
        assert all(torch.isfinite(tensor).all() for tensor in later.values())
        assert not any(torch.equal(later[name], after[name]) for name in after)
        assert [int(state["steps"]) for state in first] == ([1, 1, 2] if case == "skipped" else [1, 2, 3])


# ---------------------------------------------------------------------- one rank replays its rollout


def replaying_on_one():
    """The duals after each of three steps, in the second of which a micro-batch of rank 0 is replayed."""
    results = {}
    for model_type in ("mixtral", "deepseek_v3"):
        model = phb.patch(build(model_type), BIASED)
        balancer, rank = phb.get_balancer(model), dist.get_rank()
        states = results[model_type] = []
        for turn in range(3):
            batches = micro_batches(model, SHAPES[:2], seed=10 * turn + rank)
            balancer.begin_step(batches)
            model(**batches[0]).loss.backward()
            with balancer.replaying() if turn == 1 and rank == 0 else nullcontext():
                model(**batches[1]).loss.backward()
            model.zero_grad()
            balancer.step()
            states.append(plain(balancer.state_dict()))
    return results


def test_a_replay_on_one_rank_holds_the_biases_of_all(ranks):
    for model_type in ("mixtral", "deepseek_v3"):
        for left, right in zip(*(rank["replay"][model_type] for rank in ranks)):
            assert left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
        first, held, later = ranks[0]["replay"][model_type]
        for name in first:
            assert (first[name] == held[name]).all() == name.endswith(".bias")
            assert (held[name] != later[name]).any()


# ---------------------------------------------------------------------- one rank overflows


class Overflow(TrainerCallback):
    """The gradients of the second step are infinite on rank 1 only, after they were averaged."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and dist.get_rank() == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))


class KeepDuals(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append(plain(phb.get_balancer(model).state_dict()))


def with_scaler(folder):
    """A Trainer whose scaler skips the second step on rank 1."""
    model, duals = patched(bias_coef=0.05), KeepDuals()
    trainer = make_trainer(model, folder, callbacks=[Overflow(), duals], data=rows(32, 4, 9), max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # which fp16 would have on a GPU
    phb.attach(trainer)
    trainer.train()
    return duals.states


def test_a_scaler_that_skips_on_one_rank(ranks):
    first, second = (rank["scaler"] for rank in ranks)
    for left, right in zip(first, second):
        assert left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
    before, after, later = ({k: v for k, v in state.items() if k != "steps"} for state in first)
    assert all((before[name] == after[name]).all() for name in before)
    assert not any((after[name] == later[name]).all() for name in after)


# ---------------------------------------------------------------------- ranks with unequal tokens


def uneven(model, rank):
    """Rank 1 has fewer than half of the tokens, in a micro-batch, and one that is all padding."""
    if rank == 0:
        return micro_batches(model, SHAPES[:2])
    padding = {name: tensor.clone() for name, tensor in tiny_batch(model, 2, 6).items()}
    padding["attention_mask"].zero_()
    padding["labels"].fill_(-100)
    padding["input_ids"].zero_()
    return [padding, tiny_batch(model, 1, 10, seed=7)]


def on_uneven_ranks():
    results = {}
    for price_from in ("previous", "current", "global"):
        model = build("mixtral")
        batches = uneven(model, dist.get_rank())
        grads = []
        for config in ({"coef": 0.0}, {"coef": COEF, "bias_coef": 0.1, "price_from": price_from}):
            phb.patch(model, config)
            set_prices(model)
            grads.append(step(model, batches, items=40))
        added = difference(grads[1], grads[0])
        for grad in added.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        balancer = phb.get_balancer(model)
        results[price_from] = {
            "gradient": plain(added),
            "means": {kind: plain(balancer.means(kind)) for kind in ("probs", "load")},
            "biases": plain(balancer.biases()),
        }
    return results


def test_uneven_ranks_and_one_that_is_all_padding(ranks):
    model = build("mixtral")
    batches = [*uneven(model, 0), uneven(model, 1)[1]]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    assert tokens[0] + tokens[1] > 2 * tokens[2]
    phb.patch(model, {"coef": COEF, "bias_coef": 0.1})
    means = set_prices(model).means()
    step(model, batches, items=40)  # all of it in one process
    balancer = phb.get_balancer(model)
    for rank in ranks:
        for price_from, found in rank["uneven"].items():
            for kind in ("probs", "load"):
                for name, mean in balancer.means(kind).items():
                    torch.testing.assert_close(torch.from_numpy(found["means"][kind][name]), mean, rtol=0, atol=1e-6)
            for name, bias in balancer.biases().items():
                torch.testing.assert_close(torch.from_numpy(found["biases"][name]), bias, rtol=0, atol=1e-5)
            gradient = {name: torch.from_numpy(grad) for name, grad in found["gradient"].items()}
            assert all(torch.isfinite(grad).all() for grad in gradient.values())
            if price_from == "previous":  # the others follow the split
                expected = loss_gradient(build("mixtral"), batches, [(COEF, phi_loss(means, "previous"))])
                assert_gradient(gradient, expected)
