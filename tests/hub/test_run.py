"""What a results folder says: kept, read back, and refused by file and field where it cannot be used."""

import json
import os

import pytest

from hf_phibalance.hub import Run


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_saved_run_is_the_same(run_folder, tmp_path):
    run = Run.load(run_folder)
    run.save(tmp_path / "again")
    again = Run.load(tmp_path / "again")
    again.evaluations = run.evaluations
    assert again == run and run.series("moe/max_vio") and run.before["moe/max_vio"] > 0 < run.held_out["moe/max_vio"]


def test_newest_scores_of_each_task(run_folder):
    scores = [score for found in Run.load(run_folder).evaluations.values() for score in found]
    assert [(score.task, score.metric, score.value, score.error, score.shots, score.count) for score in scores] == [
        ("phb_gsm8k", "exact_match,strict-match", 0.125, 0.0234, 5, "200 of 1319"),
        ("phb_gsm8k", "exact_match,flexible-extract", 0.25, None, 5, "200 of 1319"),
        ("phb_gsm8k", "expert_load,max_vio", 0.75, None, 5, "200 of 1319"),
        ("humaneval", "pass@1,create_test", 0.5, 0.01, 0, "164"),
    ]


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
    (run_folder / "metrics.json").write_text('{"steps": 1}')
    with pytest.raises(ValueError, match=r"metrics\.json.*model_type"):
        Run.load(run_folder)
    (run_folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not valid JSON"):
        Run.load(run_folder)


@pytest.mark.parametrize("name", ["metrics.json", "history.json", "results_9.json", "unbalanced/metrics.json"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_not_followed(name, link, run_folder, tmp_path):
    private = tmp_path / "private.json"
    private.write_text("{}")
    (run_folder / name).unlink(missing_ok=True)
    link(private, run_folder / name)
    with pytest.raises(ValueError, match=rf"{name} is a link or no regular file"):
        Run.load_baseline(run_folder) if "/" in name else Run.load(run_folder)


@pytest.mark.parametrize("path", ["/home/me/secret/gsm8k", "../secret/gsm8k/", r"C:\Users\me\gsm8k", "~/gsm8k"])
def test_paths_are_not_kept(path, run_folder):
    change(
        run_folder / "metrics.json", dataset=path, base_model=path, command=f"python sft.py --hub_token x --y {path}"
    )
    run = Run.load(run_folder)
    assert (run.dataset, run.base_model) == ("gsm8k", "gsm8k")
    assert path not in run.summary() and "hub_token" not in run.summary()
