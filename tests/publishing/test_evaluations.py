"""Evaluations of a run: what is read, what a card says of them, and what a leaderboard takes."""

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from hf_phibalance.publishing import Run
from hf_phibalance.publishing.evaluations import eval_result_files, evaluation_text
from hf_phibalance.publishing.run import load_evaluations


def test_leaderboard_takes_whole_benchmarks_only(run_folder):
    run = Run.load(run_folder)
    (text,) = eval_result_files(run).values()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 12.5)
    assert entry.notes == "strict_match, shots 5, temperature 0.0"
    for problems in (100, None):
        run.evaluations[0]["problems"] = problems
        assert eval_result_files(run) == {}


def test_result_of_the_evaluation_recipe():
    """Its task is among the settings; generated problems are not the benchmark, whatever their number."""
    settings = {"task": "gsm8k", "dataset_path": "openai/gsm8k", "num_fewshot": 5, "prompts": "ab12", "revision": None}
    result = {"file": "eval-x.json", "metrics": {"strict_match": 0.5}, "problems": 1319, "settings": settings}
    result["balance"] = {"max_vio": 0.25}
    shown = evaluation_text(result)
    assert (shown["name"], shown["settings"]) == ("GSM8K, all 1319 problems", "num_fewshot 5")
    assert shown["rows"] == [("strict_match", "0.5000"), ("MaxVio over prompts and completions", "0.250")]
    assert list(eval_result_files(Run({}, [], [], [result]))) == ["x.yaml"]
    result["settings"] = {**settings, "dataset_path": "toy"}
    assert evaluation_text(result)["name"] == "generated gsm8k problems, 1319 problems"
    assert eval_result_files(Run({}, [], [], [result])) == {}


def test_unreadable_evaluations(tmp_path, warned):
    (tmp_path / "eval-odd.json").write_text('{"task": "odd"}')
    assert load_evaluations(tmp_path) == [] and warned.about("eval-odd.json has no `metrics`")
    (tmp_path / "eval-torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval-torn\.json is not valid JSON.*Run its evaluation again"):
        load_evaluations(tmp_path)
