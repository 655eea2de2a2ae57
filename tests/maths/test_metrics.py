"""Load metrics and mutual information, against plain loops, hand-made numbers and simulation."""

import math
import statistics

import pytest
import torch
from drawn_counts import draw

from hf_phibalance.maths import metrics, mutual_information, mutual_information_bias


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
PER_LAYER = {name: getattr(metrics, name) for name in REFERENCE}
# at balance, and with all load on one of E experts
LIMITS = {
    "max_vio": (0.0, lambda experts: experts - 1),
    "gini": (0.0, lambda experts: (experts - 1) / experts),
    "cv": (0.0, lambda experts: math.sqrt(experts - 1)),
    "normalised_entropy": (1.0, lambda experts: 0.0),
    "min_relative_load": (1.0, lambda experts: 0.0),
    "max_relative_load": (1.0, lambda experts: experts),
    "dead_experts": (0.0, lambda experts: experts - 1),
}


def random_counts(num_layers, num_experts):
    counts = torch.randint(1, 1000, (num_layers, num_experts), generator=torch.Generator().manual_seed(0))
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
    assert metrics.summarise(load_LE)[name].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", PER_LAYER)
def test_counts_and_shares_in_any_leading_shape(name):
    counts = random_counts(6, 16).double()
    shares = counts / counts.sum(-1, keepdim=True)
    torch.testing.assert_close(PER_LAYER[name](shares), PER_LAYER[name](counts))
    torch.testing.assert_close(PER_LAYER[name](counts.reshape(2, 3, 16)), PER_LAYER[name](counts).reshape(2, 3))
    assert PER_LAYER[name](counts[0]).shape == ()
    assert PER_LAYER[name](counts.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", PER_LAYER)
def test_limits(name):
    """Balance and one expert only; layers without load and layers with a single expert count as balanced."""
    balanced, one_hot = LIMITS[name]
    load_LE = torch.zeros(3, 16)
    load_LE[0], load_LE[1, 3] = 12.0, 80.0
    assert PER_LAYER[name](load_LE).tolist() == pytest.approx([balanced, one_hot(16), balanced], abs=1e-6)
    assert PER_LAYER[name](torch.tensor([[0.0], [3.0]])).tolist() == pytest.approx([balanced] * 2)


def test_dead_is_relative_to_the_fair_share():
    load_LE = torch.tensor([[0.04, 0.06, 1.9, 2.0]])
    assert metrics.dead_experts(load_LE).item() == metrics.dead_experts(load_LE / 4).item() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "top_k", "tokens"), [(8, 2, 4000), (64, 6, 4000), (64, 32, 4000)])
def test_noise_floor_against_monte_carlo(num_experts, top_k, tokens):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(60, num_experts)
    for trial in range(60):
        picks = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
        counts[trial] = torch.bincount(picks.flatten(), minlength=num_experts)
    floor = metrics.noise_floor(num_experts, top_k, tokens).item()
    deviation = metrics.cv(counts).square().mean().sqrt().item()
    assert deviation == pytest.approx(floor / math.sqrt(2 * math.log(num_experts)), rel=0.12)
    assert 0.65 * floor < metrics.max_vio(counts).mean().item() < floor


def test_noise_floor_formula_and_limits():
    expected = math.sqrt((64 - 6) / (4096 * 6)) * math.sqrt(2 * math.log(64))
    per_layer = metrics.noise_floor(64, 6, torch.tensor([4096, 1024, 0]))
    assert per_layer.tolist() == pytest.approx([expected, 2 * expected, math.inf])
    assert metrics.noise_floor(4, 4, torch.tensor([10, 0])).tolist() == [0.0, 0.0]
    for top_k in (0, 65):
        with pytest.raises(ValueError, match=rf"`top_k` is {top_k}.*1 to `num_experts` = 64"):
            metrics.noise_floor(64, top_k, 4096)


def test_mutual_information_is_the_sum_over_cells():
    counts = torch.tensor([[5, 0, 3, 9], [1, 7, 3, 0], [2, 2, 2, 2]])
    total, expected = int(counts.sum()), 0.0
    for d in range(3):
        for e in range(4):
            joint = int(counts[d, e]) / total
            if joint:
                apart = int(counts[d].sum()) / total * int(counts[:, e].sum()) / total
                expected += joint * math.log2(joint / apart)
    assert float(mutual_information(counts)) == pytest.approx(expected, rel=1e-12)
    assert float(mutual_information(torch.eye(8) * 5)) == pytest.approx(3.0)  # disjoint experts: log2 8
    assert float(mutual_information(torch.tensor([[3, 6], [5, 10]]))) == pytest.approx(0.0, abs=1e-12)
    assert float(mutual_information(torch.zeros(2, 3))) == 0.0


def test_bias_of_mutual_information_is_that_of_miller_and_madow():
    counts = torch.tensor([[50, 30, 20, 0], [40, 40, 20, 0]])  # the last expert never occurs
    cells, rows, columns, total = 6, 2, 3, 200
    expected = (cells - rows - columns + 1) / (2 * total * math.log(2))  # of H(D) + H(E) - H(D, E)
    assert mutual_information_bias(counts, top_k=1) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_bias_of_mutual_information_is_what_equal_domains_show(top_k, spread):
    generator = torch.Generator().manual_seed(0)
    logits = torch.linspace(-spread, spread, 8, dtype=torch.float64)
    found, biases = [], []
    for _ in range(300):
        counts = torch.stack([draw(logits, top_k, tokens, generator) for tokens in (400, 150)])
        found.append(float(mutual_information(counts)))
        biases.append(mutual_information_bias(counts, top_k))
    assert sum(found) == pytest.approx(sum(biases), rel=0.1)  # standard error 3 %
