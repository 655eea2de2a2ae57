"""What the comparison measures and how seeds are paired, against definitions written out naively."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch


def test_domain_information_against_its_definition(house):
    counts = torch.randint(0, 30, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    counts[0, 0, :3] = 0
    expected = []
    for layer in range(4):
        joint = np.array([counts[d, layer].numpy() / counts[d, layer].sum().item() / 3 for d in range(3)])
        terms = [
            joint[d, e] * math.log2(joint[d, e] / (joint[d].sum() * joint[:, e].sum()))
            for d, e in itertools.product(range(3), range(6))
            if joint[d, e] > 0
        ]
        expected.append(sum(terms))
    found = house["measures"].domain_information(counts)
    assert np.allclose(found, expected, atol=1e-12)
    apart = torch.eye(3).repeat_interleave(2, 1)[:, None] * 5  # every domain has two experts of its own
    assert house["measures"].domain_information(apart).item() == pytest.approx(math.log2(3))
    assert house["measures"].domain_information(torch.ones(3, 1, 6)).item() == pytest.approx(0, abs=1e-12)


def test_changed_share_against_sets(house):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: [torch.rand(50, 8, generator=generator).topk(3).indices for _ in range(2)]  # noqa: E731
    before, after = draw(), draw()
    kept = sum(len(set(a) & set(b)) for old, new in zip(before, after) for a, b in zip(old.tolist(), new.tolist()))
    assert house["measures"].changed_share(before, after) == pytest.approx(1 - kept / 300)
    assert house["measures"].changed_share(before, [chosen.flip(-1) for chosen in before]) == 0


def test_counts_and_balance_against_loops(house):
    """Three domains, 8 windows of 5 tokens, two layers, 6 experts, top-2, batches of 4 windows."""
    measures = house["measures"]
    generator = torch.Generator().manual_seed(2)
    choices = [[torch.rand(40, 6, generator=generator).topk(2).indices for _ in range(2)] for _ in range(3)]
    counts = torch.stack([measures.count_by_window(chosen, 8, 6) for chosen in choices])
    naive = [
        [[Counter(choices[d][layer][5 * w : 5 * w + 5].flatten().tolist()) for layer in range(2)] for w in range(8)]
        for d in range(3)
    ]
    for d, w, layer, e in itertools.product(range(3), range(8), range(2), range(6)):
        assert counts[d, w, layer, e] == naive[d][w][layer][e]

    def vio(windows):
        found = []
        for layer in range(2):
            load = sum((naive[d][w][layer] for d, w in windows), Counter())
            found.append(max(load.values()) / (sum(load.values()) / 6) - 1)
        return found

    everything = vio(list(itertools.product(range(3), range(8))))
    figures = measures.balance_figures(counts, rows=4)
    assert figures["max_vio_global"] == pytest.approx(np.mean(everything))
    assert figures["max_vio_worst_layer"] == pytest.approx(max(everything))
    mixed = [np.mean(vio([(d, w) for d in range(3)])) for w in range(8)]
    single = [np.mean(vio([(d, w) for w in range(i, i + 4)])) for d in range(3) for i in (0, 4)]
    assert figures["max_vio_mixed_batch"] == pytest.approx(np.mean(mixed))
    assert figures["max_vio_domain_batch"] == pytest.approx(np.mean(single))


def test_recovery_and_thinning(house):
    recover, thin = house["measures"].steps_to_recover, house["measures"].thin
    before = [9.0] * 20 + [1.0] * 20  # only the second half counts
    assert recover([*before, *[1.2] * 30], 40, smooth=5) == 0
    assert recover([*before, *[2.0] * 30], 40, smooth=5) == 30
    jump = [2.0] * 12 + [1.0] * 18  # the mean of five steps is at most 1.25 from the fourth step at 1.0 on
    assert recover([*before, *jump], 40, smooth=5) == 16
    assert thin([1.0, 3.0, 5.0, 7.0, 9.0], 3) == [2.0, 6.0, 9.0]
    assert thin(list(range(12)), 5, multiple=3) == [1.0, 4.0, 7.0, 10.0]
    assert thin([1.0, 2.0], 50) == [1.0, 2.0]


def test_paired_statistics_against_numpy(house):
    rng = np.random.default_rng(0)
    paired = house["paired"]
    for count in (2, 3, 5, 10, 14):
        base = dict(enumerate(rng.normal(4.0, 0.5, count).tolist()))
        values = {seed: value + rng.normal(0.02, 0.02) for seed, value in base.items()} | {99: 1.0}
        differences = np.array([values[seed] - base[seed] for seed in base])
        mean, spread, told = paired.paired_difference(values, base)
        assert mean == pytest.approx(differences.mean())
        assert spread == pytest.approx(differences.std(ddof=1))
        quantile = pytest.importorskip("scipy.stats").t.ppf(0.975, count - 1) if count <= 10 else 1.96
        assert told == (abs(differences.mean()) > quantile * differences.std(ddof=1) / math.sqrt(count))
        assert paired.mean_spread(list(base.values())) == pytest.approx(
            (np.mean(list(base.values())), np.std(list(base.values()), ddof=1))
        )
    mean, spread, told = paired.paired_difference({0: 1.0}, {0: 3.0})
    assert mean == -2.0 and math.isnan(spread) and not told
    with pytest.raises(ValueError, match="no seed in common"):
        paired.paired_difference({0: 1.0}, {1: 1.0})
