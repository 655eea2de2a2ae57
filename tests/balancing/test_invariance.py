"""
One optimizer step receives the declared coefficient, however it is split, wrapped, recomputed or cast.

The measurement is that of `recipes/benchmarks/invariance.py`, which runs the full matrix in a couple of minutes. Here
the matrix is complete for one rank; for two real ranks it is a subset in which every pair of values of every two axes
occurs, and the raw loop in fp32 completely.
"""

import contextlib
import functools
import gc
import itertools
import tempfile

import invariance
import numpy as np
import pytest
import torch
import torch.distributed as dist
from invariance import Cell, in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import make_trainer, patched, rows

import hf_phibalance as phb


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def quick_trainers():
    """Each trainer begins with a garbage collection, which takes longer than its training here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def measured(cell, model_type="mixtral"):
    result = invariance.measure(cell, model_type)
    assert result.ok, result
    return result


# ---------------------------------------------------------------------- one rank


@pytest.mark.parametrize("precision", invariance.PRECISIONS)
@pytest.mark.parametrize("checkpointing", invariance.CHECKPOINTING)
@pytest.mark.parametrize("trainer", invariance.TRAINERS)
def test_coefficient_is_the_declared_one(trainer, checkpointing, precision):
    for accumulation in invariance.ACCUMULATION:
        measured(Cell(trainer, checkpointing, precision, accumulation, ranks=1))


def test_micro_batches_are_unequal_in_rows_and_tokens():
    rows = invariance.build_rows()
    for parts in (2, 4, 8):
        batches = [invariance.collate([rows[i] for i in part]) for part in invariance.deal(parts)]
        assert sorted(i for part in invariance.deal(parts) for i in part) == list(range(len(rows)))
        assert len({len(batch["input_ids"]) for batch in batches}) > 1
        assert len({batch["input_ids"].shape[1] for batch in batches}) > 1
        tokens = [int(batch["attention_mask"].sum()) for batch in batches]
        assert max(tokens) > 2 * min(tokens)
        assert any((batch["attention_mask"] == 0).any() for batch in batches)


@pytest.mark.parametrize("checkpointing", invariance.CHECKPOINTING)
def test_built_in_loss_is_not_invariant(checkpointing):
    """Why this matters: under the stock `Trainer` the model's own loss grows with the accumulation, or vanishes."""
    cells = [Cell("Trainer", checkpointing, "fp32", n, ranks=1, balancing="built-in") for n in (1, 4)]
    one, four = (invariance.measure(cell, "mixtral").ratio for cell in cells)
    if checkpointing == "reentrant":
        assert one == four == 0
    else:
        assert one == pytest.approx(1, abs=1e-4)
        assert four == pytest.approx(4, rel=0.1)


# ---------------------------------------------------------------------- loops that the matrix does not have


def balanced_model(coef=invariance.COEF, checkpointing="none"):
    """The model of the matrix with its prices, and the batches of 4 micro-batches."""
    model = invariance.build_model("mixtral")
    invariance.set_checkpointing(model, checkpointing)
    phb.patch(model, {"coef": coef})
    phb.get_balancer(model).load_state_dict(invariance.reference("mixtral").duals)
    return model, micro_batches(4)


def micro_batches(parts):
    rows = invariance.build_rows()
    return [invariance.collate([rows[i] for i in part]) for part in invariance.deal(parts)]


def assert_exact(charged, plain, tolerance=1e-4):
    declared = invariance.COEF * invariance.reference("mixtral").phi
    assert (charged - plain - declared).norm() <= tolerance * declared.norm()


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
def test_checkpointing_of_every_second_layer(checkpointing):
    gradients = []
    for coef in (invariance.COEF, 0.0):
        model, batches = balanced_model(coef)
        invariance.set_checkpointing(model, checkpointing, every_n_layers=2)
        phb.get_balancer(model).begin_step(batches)
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        gradients.append(invariance.flat_gradient(model))
    assert_exact(*gradients)


# ---------------------------------------------------------------------- the duals follow


DUALS = {
    "load": {"coef": 1.0, "bias_coef": 0.02, "track": "load", "bias_track": "load"},
    "probs": {"coef": 1.0, "bias_coef": 0.02, "track": "probs", "bias_track": "load"},
}


def trajectory(accumulation, ranks, checkpointing, config):
    """Means, prices, biases and loads after each of 4 optimizer steps that really train, as numpy arrays."""
    rank = dist.get_rank() if ranks > 1 else 0
    model = phb.patch(invariance.build_model("mixtral"), config)
    invariance.set_checkpointing(model, checkpointing)
    runner = DistributedDataParallel(model) if ranks > 1 else model
    balancer, optimizer = phb.get_balancer(model), torch.optim.SGD(model.parameters(), lr=0.05)
    rows, history = invariance.build_rows(), []
    for step in range(4):
        chosen = rows[step * 4 :] + rows[: step * 2]  # other tokens, and another number of them, in every step
        parts = [chosen[i :: accumulation * ranks] for i in range(accumulation * ranks)]
        batches = [invariance.collate(part) for part in parts[rank::ranks]]
        labels = sum(sum(label != -100 for label in row["labels"][1:]) for row in chosen)
        balancer.begin_step(batches)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or ranks == 1 else runner.no_sync():
                (ranks * runner(**batch, num_items_in_batch=labels).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
        read = balancer.config.track, balancer.config.bias_track
        tables = {f"mean_{name}": balancer.means(name) for name in read}
        tables |= {"prices": balancer.prices(), "biases": balancer.biases(), "loads": balancer.loads()}
        history.append({name: torch.cat(list(table.values())).numpy() for name, table in tables.items()})
    return history


@functools.cache
def whole_trajectory(kind):
    return trajectory(1, 1, "none", DUALS[kind])


def assert_same_trajectory(history, kind):
    expected = whole_trajectory(kind)
    assert len(history) == len(expected) == 4
    for left, right in zip(history, expected):
        assert left.keys() == right.keys()
        for name in right:
            if kind == "load" or name in ("loads", "biases", "mean_load"):  # counts are integers
                np.testing.assert_array_equal(left[name], right[name], err_msg=name)
            else:
                np.testing.assert_allclose(left[name], right[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("checkpointing", invariance.CHECKPOINTING)
@pytest.mark.parametrize("kind", DUALS)
def test_duals_do_not_depend_on_accumulation(kind, checkpointing):
    assert_same_trajectory(trajectory(4, 1, checkpointing, DUALS[kind]), kind)
    first, *_, last = whole_trajectory(kind)
    for name in first:
        assert np.abs(first[name] - last[name]).max() > 1e-3  # they move


# ---------------------------------------------------------------------- two ranks, all in one process group


def covering_cells():
    """12 cells in which every pair of values of every two axes occurs."""
    cells = []
    for i, j in itertools.product(range(3), range(4)):
        checkpointing, precision = invariance.CHECKPOINTING[(i + j) % 3], invariance.PRECISIONS[(i + j) % 2]
        cells.append(Cell(invariance.TRAINERS[i], checkpointing, precision, invariance.ACCUMULATION[j], ranks=2))
    return cells


def cells_of_two_ranks():
    axes = itertools.product(["raw loop"], invariance.CHECKPOINTING, ["fp32"], invariance.ACCUMULATION, [2])
    raw = [Cell(*values) for values in axes]
    masks = [Cell("raw loop", "none", "fp32", 4, ranks=2, token_mask=mask) for mask in ("labels", "all")]
    others = [cell for cell in covering_cells() if cell not in raw]
    return [*raw, *masks, *others, Cell("Trainer", "none", "fp32", 8, ranks=2, balancing="built-in")]


@functools.cache
def sharded_gradient(coef, checkpointing, patch_first):
    """A raw loop over FSDP2, patched before or after sharding."""
    model = invariance.build_model("mixtral")
    invariance.set_checkpointing(model, checkpointing)
    if patch_first:
        phb.patch(model, {"coef": coef})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    if not patch_first:
        phb.patch(model, {"coef": coef})
    balancer = phb.get_balancer(model)
    balancer.load_state_dict(invariance.reference("mixtral").duals)
    batches = micro_batches(4 * dist.get_world_size())[dist.get_rank() :: dist.get_world_size()]
    balancer.begin_step(batches)
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)
        (model(**batch).loss / len(batches)).backward()
    balancer.step()
    return torch.cat([p.grad.full_tensor().reshape(-1).double() for p in model.parameters()])


SHARDED = {"patched_first": ("none", True), "sharded_first": ("none", False), "recomputed": ("non-reentrant", True)}


def sharded_residuals():
    declared = invariance.COEF * invariance.reference("mixtral").phi
    residuals = {}
    for name, case in SHARDED.items():
        added = sharded_gradient(invariance.COEF, *case) - sharded_gradient(0.0, "none", True)
        residuals[name] = float((added - declared).norm() / declared.norm())
    return residuals


def refusal_after_evaluation():
    """What is said when a `Trainer` evaluates before it trains, and so would train each rank on its own."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(patched(coef=0.1), folder, eval_dataset=rows(4), max_steps=1)
        phb.attach(trainer)
        trainer.evaluate()
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error)


def on_each_rank():
    invariance.prepare_process()
    return {
        "refusal": refusal_after_evaluation(),
        "matrix": [invariance.measure(cell, "mixtral") for cell in cells_of_two_ranks()],
        "sharded": sharded_residuals(),
        "duals": {kind: trajectory(2, 2, "none", config) for kind, config in DUALS.items()},
    }


@pytest.fixture(scope="module")
def two_ranks():
    """What `on_each_rank` found on ranks 0 and 1."""
    return in_ranks(on_each_rank, 2)


def test_the_subset_covers_every_pair():
    axes = ("trainer", "checkpointing", "precision", "accumulation")
    for left, right in itertools.combinations(axes, 2):
        complete, covered = (
            {(getattr(cell, left), getattr(cell, right)) for cell in cells}
            for cells in (invariance.all_cells(), covering_cells())
        )
        assert covered == complete


def test_coefficient_on_two_ranks(two_ranks):
    for results in two_ranks:
        assert {result.cell for result in results["matrix"]} >= set(covering_cells())
        assert [result for result in results["matrix"] if not result.ok] == []


def test_built_in_loss_on_two_ranks(two_ranks):
    (stock,) = [result for result in two_ranks[0]["matrix"] if result.cell.balancing == "built-in"]
    assert stock.cell.accumulation * stock.cell.ranks == 16
    assert stock.ratio == pytest.approx(16, rel=0.1)


def test_ranks_that_would_train_apart_are_refused(two_ranks):
    for results in two_ranks:
        assert "2 processes train without exchanging gradients" in results["refusal"]


def test_coefficient_under_fsdp2(two_ranks):
    for results in two_ranks:
        assert results["sharded"].keys() == SHARDED.keys()
        assert max(results["sharded"].values()) < 1e-4, results["sharded"]


@pytest.mark.parametrize("kind", DUALS)
def test_duals_do_not_depend_on_ranks(kind, two_ranks):
    for results in two_ranks:
        assert_same_trajectory(results["duals"][kind], kind)


# ---------------------------------------------------------------------- the report


def test_report_shows_what_is_out_of_bounds():
    good, bad = Cell("Trainer", "none", "fp32", 1, 1), Cell("Trainer", "none", "fp32", 2, 1)
    results = [invariance.Result(good, 1.0, 0.0), invariance.Result(bad, 2.0, 1.0)]
    assert invariance.Result(bad, 1.0, 1.0).ok is False  # right in projection only
    assert (
        invariance.markdown(results).splitlines()[2]
        == "| Trainer | none | fp32 | 1.0000 | **2.0000** |  |  |  |  |  |  |"
    )
