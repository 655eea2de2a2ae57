"""Load-balance metrics against their definitions, written as plain loops, and against hand-made figures."""

import math
import statistics

import pytest
import torch

from hf_phibalance.maths import metrics


PER_LAYER = {
    "max_vio": metrics.max_vio,
    "gini": metrics.gini,
    "cv": metrics.cv,
    "normalised_entropy": metrics.normalised_entropy,
    "min_relative_load": metrics.min_relative_load,
    "max_relative_load": metrics.max_relative_load,
    "dead_experts": metrics.dead_experts,
}


def mean_absolute_difference(load):
    return sum(abs(a - b) for a in load for b in load) / len(load) ** 2


REFERENCE = {
    "max_vio": lambda load: (max(load) - statistics.mean(load)) / statistics.mean(load),
    "gini": lambda load: mean_absolute_difference(load) / (2 * statistics.mean(load)),
    "cv": lambda load: statistics.pstdev(load) / statistics.mean(load),
    "normalised_entropy": lambda load: sum(
        -(x / sum(load)) * math.log(x / sum(load), len(load)) for x in load if x > 0
    ),
    "min_relative_load": lambda load: min(load) * len(load) / sum(load),
    "max_relative_load": lambda load: max(load) * len(load) / sum(load),
    "dead_experts": lambda load: sum(1 for x in load if x / sum(load) < 0.05 / len(load)),
}

BALANCED = {
    "max_vio": 0.0,
    "gini": 0.0,
    "cv": 0.0,
    "normalised_entropy": 1.0,
    "min_relative_load": 1.0,
    "max_relative_load": 1.0,
    "dead_experts": 0.0,
}


def random_counts(num_layers, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 1000, (num_layers, num_experts), generator=generator)
    counts[:, 0] = 0
    counts[::2, 1] = 3
    return counts


@pytest.mark.parametrize("name", PER_LAYER)
@pytest.mark.parametrize("num_experts", [2, 7, 64])
def test_definition(name, num_experts):
    load_LE = random_counts(5, num_experts)
    expected = [REFERENCE[name](row) for row in load_LE.tolist()]
    assert PER_LAYER[name](load_LE.double()).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert PER_LAYER[name](load_LE).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", PER_LAYER)
def test_counts_and_shares_in_any_leading_shape(name):
    counts = random_counts(6, 16).double()
    shares = counts / counts.sum(-1, keepdim=True)
    torch.testing.assert_close(PER_LAYER[name](shares), PER_LAYER[name](counts))
    torch.testing.assert_close(PER_LAYER[name](counts.reshape(2, 3, 16)), PER_LAYER[name](counts).reshape(2, 3))
    assert PER_LAYER[name](counts[0]).shape == ()
    assert PER_LAYER[name](counts.bfloat16()).dtype == torch.float32


def test_by_hand():
    summary = metrics.summarise(torch.tensor([[1.0, 3.0, 4.0, 0.0]]))
    assert summary["max_vio"].item() == pytest.approx(1.0)
    assert summary["gini"].item() == pytest.approx((-3 * 0 - 1 * 1 + 1 * 3 + 3 * 4) / (4 * 8))
    assert summary["cv"].item() == pytest.approx(math.sqrt((1 + 1 + 4 + 4) / 4) / 2)
    entropy = math.log(8) / 8 + 3 / 8 * math.log(8 / 3) + math.log(2) / 2
    assert summary["normalised_entropy"].item() == pytest.approx(entropy / math.log(4))
    assert summary["min_relative_load"].item() == 0.0
    assert summary["max_relative_load"].item() == pytest.approx(2.0)
    assert summary["dead_experts"].item() == 1.0


def test_balanced_and_one_hot():
    num_experts = 16
    load_LE = torch.zeros(2, num_experts)
    load_LE[0], load_LE[1, 3] = 12.0, 80.0
    one_hot = {
        "max_vio": num_experts - 1,
        "gini": (num_experts - 1) / num_experts,
        "cv": math.sqrt(num_experts - 1),
        "normalised_entropy": 0.0,
        "min_relative_load": 0.0,
        "max_relative_load": num_experts,
        "dead_experts": num_experts - 1,
    }
    for name, metric in PER_LAYER.items():
        assert metric(load_LE).tolist() == pytest.approx([BALANCED[name], one_hot[name]], abs=1e-6), name


def test_nothing_routed_and_a_single_expert_count_as_balanced():
    for load_LE in (torch.tensor([[0, 0, 0], [1, 5, 0]]), torch.tensor([[0.0], [3.0]])):
        for name, metric in PER_LAYER.items():
            values = metric(load_LE)
            assert values[0].item() == pytest.approx(BALANCED[name]), name
            assert not values.isnan().any(), name
    assert metrics.max_vio(torch.tensor([[0, 0, 0], [1, 5, 0]]))[1].item() == pytest.approx(1.5)


def test_dead_is_relative_to_the_fair_share():
    # relative loads 0.04, 0.06 and two that fill up the mean to 1
    load_LE = torch.tensor([[0.04, 0.06, 1.9, 2.0]])
    assert metrics.dead_experts(load_LE).item() == 1
    assert metrics.dead_experts(load_LE / 4).item() == 1
    assert metrics.dead_experts(load_LE, threshold=0.01).item() == 0
    assert metrics.dead_experts(load_LE, threshold=0.07).item() == 2
    for threshold in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="`threshold` is"):
            metrics.dead_experts(load_LE, threshold=threshold)


@pytest.mark.parametrize(("num_experts", "top_k", "tokens"), [(8, 2, 4000), (64, 6, 4000), (64, 32, 4000)])
def test_noise_floor_against_monte_carlo(num_experts, top_k, tokens):
    generator = torch.Generator().manual_seed(0)
    trials = 60
    counts = torch.zeros(trials, num_experts)
    for trial in range(trials):
        picks = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
        counts[trial] = torch.bincount(picks.flatten(), minlength=num_experts)
    floor = metrics.noise_floor(num_experts, top_k, tokens).item()
    deviation = metrics.cv(counts).square().mean().sqrt().item()
    assert deviation == pytest.approx(floor / math.sqrt(2 * math.log(num_experts)), rel=0.12)
    assert 0.65 * floor < metrics.max_vio(counts).mean().item() < floor


def test_noise_floor_formula_and_limits():
    expected = math.sqrt((64 - 6) / (4096 * 6)) * math.sqrt(2 * math.log(64))
    assert metrics.noise_floor(64, 6, 4096).item() == pytest.approx(expected)
    per_layer = metrics.noise_floor(64, 6, torch.tensor([4096, 1024, 0]))
    assert per_layer.tolist() == pytest.approx([expected, 2 * expected, math.inf])
    assert metrics.noise_floor(4, 4, torch.tensor([10, 0])).tolist() == [0.0, 0.0]
    for top_k in (0, 65):
        with pytest.raises(ValueError, match=rf"`top_k` is {top_k}.*1 to `num_experts` = 64"):
            metrics.noise_floor(64, top_k, 4096)


def test_summarise_is_all_metrics():
    counts = random_counts(3, 8)
    summary = metrics.summarise(counts, top_k=2, dead_threshold=0.5)
    assert set(summary) == {*PER_LAYER, "noise_floor"}
    assert set(metrics.summarise(counts)) == set(PER_LAYER)
    for name, values in summary.items():
        assert values.shape == (3,), name
        if name in PER_LAYER:
            kwargs = {"threshold": 0.5} if name == "dead_experts" else {}
            torch.testing.assert_close(values, PER_LAYER[name](counts, **kwargs))
    tokens = counts[1].sum().item() / 2
    assert summary["noise_floor"][1].item() == pytest.approx(metrics.noise_floor(8, 2, tokens).item())
