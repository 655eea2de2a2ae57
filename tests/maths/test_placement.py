"""Experts on ranks: against every placement there is, where they can be counted."""

import itertools

import pytest
import torch

from hf_phibalance.maths import busiest_rank, least_busiest_rank, spread_experts


def placements(experts, ranks):
    """Every way to put `experts` on `ranks` ranks, equally many on each; ranks are alike."""
    if ranks == 1:
        yield [experts]
        return
    first, *others = experts
    for some in itertools.combinations(others, len(experts) // ranks - 1):
        left = [expert for expert in others if expert not in some]
        for rest in placements(left, ranks - 1):
            yield [[first, *some], *rest]


@pytest.mark.parametrize("experts, ranks, gap", [(8, 2, 1.03), (9, 3, 1.03), (8, 4, 1.0), (6, 6, 1.0), (6, 1, 1.0)])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_busiest_rank_is_nearly_that_of_the_best_placement(experts, ranks, gap, spread):
    generator = torch.Generator().manual_seed(experts + ranks)
    found = []
    for _ in range(20):
        load_E = (spread * torch.randn(experts, generator=generator, dtype=torch.float64)).exp()
        best = min(
            max(float(load_E[some].sum()) for some in placement)
            for placement in placements(list(range(experts)), ranks)
        )
        best *= ranks / float(load_E.sum())
        order_E = spread_experts(load_E, ranks)
        assert sorted(order_E.tolist()) == list(range(experts))
        assert float(least_busiest_rank(load_E, ranks)) <= best * (1 + 1e-9)
        found.append(float(busiest_rank(load_E[order_E], ranks)) / best)
    assert min(found) >= 1 - 1e-9 and sum(found) / len(found) <= 1.005 and max(found) <= gap + 1e-9


def test_swaps_improve_on_the_greedy_choice():
    """Busiest first puts 9, 4 and 2 on one rank. One swap leaves 9, 2 and 2, as much as 5, 4 and 4."""
    load_E = torch.tensor([9.0, 5.0, 4.0, 4.0, 2.0, 2.0])
    assert float(busiest_rank(load_E[spread_experts(load_E, 2)], 2)) == 1.0


def test_the_load_of_the_busiest_rank():
    load_LE = torch.tensor([[4.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    assert busiest_rank(load_LE, 2).tolist() == [1.5, 2.0, 1.0]
    assert busiest_rank(load_LE, 4).tolist() == [2.0, 4.0, 1.0]
    assert least_busiest_rank(load_LE, 2).tolist() == [1.25, 2.0, 1.0]


@pytest.mark.parametrize("ranks", [0, 3, 8])
def test_ranks_must_divide_the_experts(ranks):
    with pytest.raises(ValueError, match=rf"`ranks` is {ranks}.*4 experts.*divisor of 4"):
        spread_experts(torch.ones(4), ranks)
