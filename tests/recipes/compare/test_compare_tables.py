"""Tables of the comparison: of made-up results, and those of its README, which follow from the committed runs."""

import itertools

import numpy as np
import pytest
from paths import ROOT


def test_table_of_made_up_results(house, tmp_path):
    """Means, spreads, paired differences, a run that diverged, and the best of a family, against numpy."""
    plans, tables = house["plans"], house["tables"]
    methods = [
        method
        for entry in ({"label": "none", "method": "none"}, {"label": "φ {coef}", "family": "φ", "coef": [0.1, 0.2]})
        for method in plans.expand(entry)
    ]
    plan = plans.Plan(name="made-up", methods=methods, baseline="none", streams=["mixed"])
    results = house["records"].Results(tmp_path / "results.jsonl")
    losses = {"none": [4.0, 4.2, 4.1], "φ 0.1": [3.9, 4.11, 4.02], "φ 0.2": [3.8, None, 4.3]}
    for run, (seed, label) in zip(plan.runs(), itertools.product(range(3), losses)):
        loss = losses[label][seed]
        figures = {column.name: 0.5 for column in (*tables.COLUMNS, *tables.MORE_COLUMNS)} | {"loss": loss}
        if seed == 1:
            del figures["gini"]  # as an earlier version wrote it
        figures = {"diverged_at": 7} if loss is None else figures
        results.add({"key": run.key, "settings": run.settings, "metrics": figures, "curve": {}, "experts": []})
    (path,) = tables.write_tables(plan, results, tmp_path)
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]
    difference = np.array(losses["φ 0.1"]) - np.array(losses["none"])
    assert rows[2][:4] == ["| none", "3", f"{np.mean(losses['none']):.3f} ± 0.100", ""]
    assert rows[3][3] == f"{difference.mean():+.3f} ± {difference.std(ddof=1):.3f} *"
    assert rows[4][1] == "2, 1 diverged"
    assert rows[4][3].startswith("+0.000 ± 0.283")
    assert "2 settings of *φ*: loss 4.010 with `φ 0.1`" in path.read_text()
    taken_together = tables.summary(plan, house["finished"].finished(plan, results)).splitlines()
    error = difference.std(ddof=1) / 3**0.5
    assert taken_together[2] == f"| φ 0.1 | 3 | {difference.mean():+.4f} ± {error:.4f} | 3 | 1.00 | 0 |"
    assert taken_together[3].startswith("| φ 0.2 | 2 | +0.0000 ± 0.2000 | 1 |")


@pytest.mark.parametrize(
    ("page", "name", "rooms"),
    [
        ("README.md", "main", ("plans", "tables")),
        ("FINETUNING.md", "finetune", ("finetuning.plans", "finetuning.tables")),
    ],
)
def test_the_tables_of_a_page_follow_from_the_committed_runs(house, page, name, rooms):
    folder = ROOT / "recipes" / "compare"
    plans, tables = (house[room] for room in rooms)
    _, wanted = plans.load_plans(folder / f"{name}.yaml")
    results = house["records"].Results(folder / "results" / f"{name}.jsonl")
    text = (folder / page).read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- /table -->") > 3
    assert tables.refresh(text, wanted, results) == text
    with pytest.raises(ValueError, match="nothing"):
        tables.refresh("<!-- table: nothing; blocked -->\n<!-- /table -->", wanted, results)
