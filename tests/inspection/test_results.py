"""Figures of an inspection against simulation: what chance gives, what depends within sequences, what is marked."""

import pytest
import torch
from drawn_counts import draw
from made_texts import make_tokenizer, words
from tiny import tiny_model

from hf_phibalance.inspection import inspect_model, parse_domains
from hf_phibalance.inspection.results import (
    balance_figures,
    chance_figures,
    design_effect,
    lift,
    specialisation_figures,
)
from hf_phibalance.maths import summarise


def test_chance_figures_are_what_uniform_choices_show():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(torch.zeros(16).double(), 4, 500, generator) for _ in range(300)])
    expected, shown = chance_figures(16, 4, 500), summarise(drawn.double())
    assert float(shown["cv"].square().mean().sqrt()) == pytest.approx(expected["cv"], rel=0.05)
    assert float(shown["gini"].mean()) == pytest.approx(expected["gini"], rel=0.05)
    lacking = 1 - shown["normalised_entropy"].mean()
    assert float(lacking) == pytest.approx(1 - expected["normalised_entropy"], rel=0.05)


def test_dependence_within_sequences_is_measured():
    """Sequences of 20 equal tokens carry 20 times less information, and equal domains stay within the noise."""
    generator, zeros = torch.Generator().manual_seed(0), torch.zeros(8).double()
    effects, information, noise = [], [], 0
    for _ in range(60):
        halves = 20 * torch.stack([torch.stack([draw(zeros, 2, 40, generator) for _ in range(3)]) for _ in range(2)])
        effects.append(design_effect(halves[:, 0], 2))
        figures = specialisation_figures(halves, 2)
        information.append(figures["plug_in"] - figures["bias"])
        noise += figures["noise"]
        assert figures["bias"] > 5 * figures["bias_if_independent"]
    assert sum(effects) / 60 == pytest.approx(20, rel=0.2)
    assert abs(sum(information)) / 60 < 0.1 * figures["bias"] + 2e-3
    assert noise >= 50
    assert design_effect(torch.stack([draw(zeros, 2, 4000, generator) for _ in range(2)]), 2) < 3


def test_noise_and_dead_experts_are_marked():
    even = balance_figures(torch.tensor([[503, 497, 500, 500], [499, 501, 498, 502]]), top_k=1)["noise"]
    assert not even.pop("dead_experts") and all(even.values()) and len(even) == 4
    figures = balance_figures(torch.tensor([[900, 60, 39, 1], [900, 60, 39, 1]]), top_k=1)
    assert not any(figures["noise"].values())
    assert figures["dead"] == [3] and figures["dead_experts"] == 1
    assert figures["max_vio"] == pytest.approx(2.6) and figures["chance"]["max_vio"] < 0.1
    few = balance_figures(torch.tensor([[2, 1, 0, 0], [0, 1, 1, 0]]), top_k=1)
    assert few["dead_experts"] == 1 and few["noise"]["dead_experts"]


def test_specialists_are_the_experts_that_a_domain_prefers(tmp_path):
    torch.testing.assert_close(lift(torch.tensor([[3, 1], [1, 3]])), torch.tensor([[1.5, 0.5], [0.5, 1.5]]).double())
    (tmp_path / "a.txt").write_text(words(600, last=8))
    (tmp_path / "b.txt").write_text(words(600, first=123))
    domains = parse_domains([f"a={tmp_path}/a.txt", f"b={tmp_path}/b.txt"])
    found = inspect_model(tiny_model("mixtral", num_hidden_layers=1), make_tokenizer(), domains, seq_len=20)
    counts = found.layers[0].counts
    for index, name in enumerate("ab"):
        best = found.specialists(name, top=3)
        assert best and best == sorted(best, key=lambda entry: -entry["bits"])
        for entry in best:
            assert entry["share"] == pytest.approx(float(counts[index, entry["expert"]] / 600))
            assert entry["share_elsewhere"] == pytest.approx(float(counts[1 - index, entry["expert"]] / 600))
            assert entry["share"] > entry["share_elsewhere"]
    figures = specialisation_figures(found.layers[0].halves, 2)
    assert figures["max_bits"] == pytest.approx(1.0) and 0 < figures["mutual_information"] < figures["plug_in"]
