"""Mutual information of domain and expert: against its definition, and its bias against theory and simulation."""

import math

import pytest
import torch
from drawn_counts import draw

from hf_phibalance.maths.information import mutual_information, mutual_information_bias


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
    assert float(mutual_information(torch.eye(8) * 5)) == pytest.approx(3.0)  # disjoint experts: all of log2 8
    assert float(mutual_information(torch.tensor([[3, 6], [5, 10]]))) == pytest.approx(0.0, abs=1e-12)


def test_bias_of_mutual_information_is_that_of_miller_and_madow():
    counts = torch.tensor([[50, 30, 20, 0], [40, 40, 20, 0]])  # the last expert never occurs
    cells, rows, columns, total = 6, 2, 3, 200
    expected = (cells - rows - columns + 1) / (2 * total * math.log(2))  # of H(D) + H(E) - H(D, E)
    assert mutual_information_bias(counts, top_k=1) == pytest.approx(expected)


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
