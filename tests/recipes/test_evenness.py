"""The tables of EVENNESS.md follow from committed results, and their figures are those of naive sums."""

import itertools
import re
import statistics

import evenness
import pytest
import torch
from comparison import harness


@pytest.fixture(scope="module")
def page():
    return evenness.PAGE.read_text(encoding="utf-8")


def test_the_tables_follow_from_the_committed_results(page):
    assert sorted(re.findall(r"<!-- table: (\w+) -->", page)) == sorted(evenness.TABLES)
    assert page.count("<!-- /table -->") == len(evenness.TABLES)
    assert evenness.updated(page) == page, "run: python recipes/benchmarks/evenness.py"
    spoilt = page.replace("| none |", "| nine |")
    assert spoilt != page and evenness.updated(spoilt) == page


def test_a_predicted_ratio_is_that_of_the_busiest_rank(page):
    """From the lines of the results file, without the harness: loads of 64 experts, two on each of 32 ranks."""
    path = evenness.RECIPES / "compare" / "results" / "main.jsonl"
    found = {}
    for record in harness.Results(path)._records.values():
        (record,) = record.values()
        settings = record["settings"]
        wanted = {"model": "qwen3_moe", "stream": "mixed", "steps": 500, "micro_batches": 1, "model_fields": {}}
        if any(settings.get(name) != value for name, value in wanted.items()):
            continue
        if settings["method"] == {"bias_coef": 0.0, "coef": 0.0, "method": "none", "token_mask": "attention"}:
            layers = []
            for layer in record["experts"]:
                loads = [sum(domain[expert] for domain in layer) for expert in range(64)]
                ranks = [loads[start] + loads[start + 1] for start in range(0, 64, 2)]
                layers.append(max(ranks) * 32 / sum(ranks))
            found[settings["seed"]] = statistics.fmean(layers)
    assert sorted(found) == [0, 1, 2]
    line = next(line for line in evenness.predicted().splitlines() if line.startswith("| none |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    values = list(found.values())
    assert cells[1 + 3 + 2 + 2] == f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def test_a_placement_is_fitted_on_one_half_and_measured_on_the_other():
    generator = torch.Generator().manual_seed(0)
    halves_LHE = torch.randint(1, 100, (2, 2, 6), generator=generator).double()
    linear, placed, least = evenness.placement_figures(halves_LHE, 2)
    expected = []
    for fitted, held in halves_LHE.tolist():
        best = min(
            itertools.combinations(range(6), 3),
            key=lambda some: max(sum(fitted[e] for e in some), sum(fitted) - sum(fitted[e] for e in some)),
        )
        one = sum(held[expert] for expert in best)
        expected.append((2 * max(sum(held[:3]), sum(held[3:])) / sum(held), 2 * max(one, sum(held) - one) / sum(held)))
    assert (linear, placed) == pytest.approx([statistics.fmean(values) for values in zip(*expected)])
    assert least <= placed
