"""Plans of the comparison, and its results file."""

import json

import pytest
import torch
from comparison import small_run
from paths import ROOT


def test_expansion_of_methods(house):
    expand = house["plans"].expand
    entry = {"label": "φ {coef}", "coef": [0.1, 0.2], "ema_rate": [0.3, 0.5], "track": "load"}
    found = [(m.label, m.family, m.arguments) for m in expand(entry)]
    assert found == [
        (f"φ {coef} ema_rate={rate}", "φ {coef}", {"coef": coef, "ema_rate": rate, "track": "load"})
        for coef in (0.1, 0.2)
        for rate in (0.3, 0.5)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plans: {a: {methods: [{label: x, cof: 1}]}}", "plan 'a', method 'x'.*cof"),
        ("plans: {a: {methods: [{label: x, coef: -1}]}}", "plan 'a', method 'x'.*coef"),
        ("plans: {a: {methods: [{label: x}, {label: x}]}}", "two methods have the label 'x'"),
        ("plans: {a: {baseline: y, methods: [{label: x}]}}", "`baseline` is 'y'"),
        ("plans: {a: {models: [gpt], methods: [{label: x}]}}", "`models` has 'gpt'"),
        ("plans: {a: {stepps: 3, methods: [{label: x}]}}", "unknown field 'stepps'"),
        ("plans: {a: {micro_batches: 20, methods: [{label: x}]}}", "`micro_batches`"),
        ("plans: {a: {}}", "`methods` is missing"),
        ("plans: {}", "must hold a mapping with `plans`"),
    ],
)
def test_bad_plans_are_refused(house, tmp_path, text, message):
    path = tmp_path / "plans.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        house["plans"].load_plans(path)


def test_plans_that_ship_are_valid(house):
    paths = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))
    assert paths
    for path in paths:
        kind = "finetuning.plans" if "bases" in house["plans"].read_plans_file(path) else "plans"
        for plan in house[kind].load_plans(path)[1]:
            assert list(plan.runs()), path
            shapes = {(run.model, json.dumps(run.model_fields)) for run in models_of(plan)}
            for model, fields in shapes:
                with torch.device("meta"):  # without memory, at whatever size
                    house["models"].build_model(model, 1024, 0, **json.loads(fields))


def models_of(plan):
    """What has a `model` and its fields: runs, or the bases of fine-tuning."""
    return plan.bases if hasattr(plan, "bases") else plan.runs()


def test_results_survive_a_cut_line(house, tmp_path):
    path = tmp_path / "results.jsonl"
    runs = [small_run(house, seed=seed) for seed in range(3)]
    records = [{"key": run.key, "settings": run.settings, "metrics": {"loss": run.seed}} for run in runs]
    results = house["records"].Results(path)
    results.add(records[0])
    results.add(records[1])
    path.write_bytes(path.read_bytes()[:-40])  # killed while writing
    with pytest.warns(UserWarning, match="line 2 is no result"):
        results = house["records"].Results(path)
    assert runs[0] in results and runs[1] not in results and len(results) == 1
    results.add(records[2])
    with pytest.warns(UserWarning, match="line 2 is no result"):
        results = house["records"].Results(path)
    assert [run in results for run in runs] == [True, False, True]
    other = small_run(house, seed=0, corpus="other text")
    assert other not in results and results.get(small_run(house, seed=0, corpus="")) == records[0]
