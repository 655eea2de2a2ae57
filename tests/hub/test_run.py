"""A results folder: written, read back, and refused by file and field if it cannot be used."""

import json
from dataclasses import replace

import pytest

from hf_phibalance.hub import Run, write_report


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_saved_run_is_the_same(run_folder, tmp_path):
    run = Run.load(run_folder)
    run.save(tmp_path / "again")
    again = Run.load(tmp_path / "again")
    again.evaluations = run.evaluations
    assert again == run and run.series("moe/max_vio") and run.before["moe/max_vio"] > 0 < run.held_out["moe/max_vio"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("metrics.json", {"steps": "many"}, "'steps' expected int, got str"),
        ("metrics.json", {"held_out": {"loss": "0.1"}}, "'held_out'"),
        ("metrics.json", {"auto_class": "os"}, "'auto_class'"),
        ("metrics.json", {"balance": {"coef": 1, "new": 1}}, "unknown PhiBalanceConfig field.*'new'"),
        ("metrics.json", {"balance": []}, "'balance'"),
        ("metrics.json", {"model_type": "x" * 10**6, "steps": []}, "'steps' expected int"),
        ("history.json", {"log_history": {}}, "'log_history' expected a list"),
        ("history.json", {"loads": None}, "'loads' expected a list"),
        ("results_9.json", {"results": [0.5]}, "'results' expected an object"),
        ("results_9.json", {"results": {"x": {}}, "n-samples": {"x": 3}}, "'x' expected an object, got 3"),
        ("results_9.json", {"results": {"x": {"a,b": 1}}, "n-shot": {"x": "five"}}, "'shots'"),
    ],
)
def test_a_bad_field_is_named(run_folder, name, fields, message):
    path = run_folder / name
    if not path.exists():
        path.write_text("{}")
    change(path, **fields)
    with pytest.raises(ValueError, match=rf"(?s){name}.*{message}.*Run it again, or remove the file") as caught:
        Run.load(run_folder)
    assert len(str(caught.value)) < 1000


def test_a_missing_field_and_a_torn_file_are_named(run_folder):
    for text, message in (('{"steps": 1}', r"metrics\.json.*model_type"), ("{", r"metrics\.json is not valid JSON")):
        (run_folder / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Run.load(run_folder)


@pytest.mark.parametrize("path", ["/home/me/secret/gsm8k", "../secret/gsm8k/", r"C:\Users\me\gsm8k", "~/gsm8k"])
def test_paths_are_not_kept(path, run_folder):
    command = f"python sft.py --hub_token x --y {path}"
    change(run_folder / "metrics.json", dataset=path, base_model=path, command=command)
    run = Run.load(run_folder)
    assert (run.dataset, run.base_model) == ("gsm8k", "gsm8k")
    assert path not in run.summary() and "hub_token" not in run.summary()


def test_scores_of_an_earlier_model_are_left_out(run_folder):
    run = Run.load(run_folder)
    (path,) = run_folder.glob("eval/*/results_2026-01-03*")
    for later, tasks in ((-1, {"phb_gsm8k"}), (1, {"phb_gsm8k", "humaneval"})):
        change(path, date=run.finished + later)
        assert Run.load(run_folder).evaluations.keys() == tasks


def test_a_report_replaces_the_baseline_of_an_earlier_one(run_folder):
    run, first = Run.load(run_folder), Run.load_baseline(run_folder)
    second = replace(first, steps=first.steps + 1)
    for baseline in (first, second, None, second, first, first):
        write_report(run_folder, run, baseline, dpi=20)
        found = Run.load_baseline(run_folder)
        assert (found and found.summary()) == (baseline and baseline.summary())
    # the recipe saves its own there before the report
    second.save(run_folder / "unbalanced")
    write_report(run_folder, run, second, dpi=20)
    assert Run.load_baseline(run_folder).summary() == second.summary()
    assert (run_folder / "unbalanced" / "metrics.json").exists()
    assert not (run_folder / "baseline" / "metrics.json").exists()
