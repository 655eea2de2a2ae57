"""HumanEval's pass@k: right programs pass, and wrong ones fail."""

import gzip
import itertools
import json

import pytest
from evaluated import ADD_ONE
from paths import DATA

from hf_phibalance.evaluation import CodeExecutionError, HumanEvalPassAtK, pass_at_k, score_humaneval


pytestmark = pytest.mark.slow


@pytest.fixture
def humaneval(tmp_path):
    return HumanEvalPassAtK(cache_dir=str(tmp_path))


def humaneval_problems():
    path = DATA / "humaneval" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in {path.parent}")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for samples in range(1, 8):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            verdicts = [True] * correct + [False] * (samples - correct)
            choices = list(itertools.combinations(verdicts, k))
            expected = sum(any(choice) for choice in choices) / len(choices)
            assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)
    for wrong in ((1, 0, 2), (1, 2, 1), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="needs 1 <= k <= samples"):
            pass_at_k(*wrong)


def test_humaneval_verdicts_and_pass_at_k(humaneval, monkeypatch):
    """Half of the completions of the first problem are right, as in the samples that openai/human-eval comes with."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    completions = [
        "    import subprocess\n    subprocess.check_output('rm -rf tmp')\n",
        "    import time\n    time.sleep(10)\n    return x + 1\n",
        "    return input('a number: ')\n",
        "    return x + 1\n",
        "  return x + 1\n",
        "\treturn x + 1\n",
    ]
    predictions = [completions, ["    return x\n", "    return x + 1"]]
    references = [ADD_ONE, {**ADD_ONE, "canonical_solution": "    return x + 1\n"}]
    result = humaneval.compute(predictions=predictions, references=references, k=[1, 2, 4], timeout=2)
    first, second = result["results"]
    assert [verdict["status"] for verdict in first] == ["failed", "timed out", "failed", "passed", "passed", "passed"]
    assert [verdict["passed"] for verdict in second] == [False, True]
    assert "AssertionError at `assert candidate(1) == 2`" in second[0]["reason"]
    assert result["pass@1"] == pytest.approx(0.5)
    assert result["pass@2"] == pytest.approx((1 - 3 / 6 * 2 / 5 + 1) / 2)
    assert "pass@4" not in result  # the second problem has two completions only
    assert result["isolation"] == "bubblewrap"
    assert json.loads(json.dumps(result)) == result


def test_one_problem_at_a_time_and_without_walls():
    completions = ["    return x + 1\n", "    raise ValueError(chr(0xd800))\n", "    return 'x' * (70 << 20)\n"]
    for unsafe, isolation in ((False, "bubblewrap"), (True, "none")):
        options = {"k": [1], "timeout": 5.0, "allow_code_execution": True, "unsafe": unsafe}
        result = score_humaneval([completions], [ADD_ONE], **options)
        assert result["pass@1"] == pytest.approx(1 / 3) and result["isolation"] == isolation
        assert [verdict["status"] for verdict in result["results"][0]] == ["passed", "failed", "failed"]
        assert json.loads(json.dumps(result).encode()) == result


def test_completions_cannot_read_the_checks(tmp_path):
    """The metric keeps its problems in files of the caller."""
    find = (
        "    import glob, os\n    for name in filter(os.path.isfile, glob.glob('{}/**', recursive=True)):\n"
        "        if b'candidate(41) == 42' in open(name, 'rb').read():\n            return x + 1\n"
    )
    for unsafe, score in ((False, 0.0), (True, 1.0)):
        result = HumanEvalPassAtK(cache_dir=str(tmp_path)).compute(
            predictions=[[find.format(tmp_path)]], references=[ADD_ONE], allow_code_execution=True, unsafe=unsafe
        )
        assert result["pass@1"] == score


def test_all_canonical_solutions_of_humaneval_pass_and_others_fail(humaneval):
    """The others are the empty body and the solution of the next problem."""
    problems = humaneval_problems()
    solutions = [problem["canonical_solution"] for problem in problems]
    predictions = [[solution] for solution in solutions]
    for number in range(11):
        predictions[number] += ["    pass\n", solutions[number + 1]]
    options = {"timeout": 20.0, "allow_code_execution": True}  # the machine may be busy with other tests
    results = humaneval.compute(predictions=predictions, references=problems, **options)["results"]
    assert len(problems) == 164
    for problem, (right, *wrong) in zip(problems, results):
        assert right["passed"], (problem["task_id"], right)
        assert all(verdict["status"] == "failed" for verdict in wrong), (problem["task_id"], wrong)


def test_humaneval_refuses_what_it_cannot_run(humaneval, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(CodeExecutionError, match="HF_ALLOW_CODE_EVAL=1 or pass allow_code_execution=True"):
        humaneval.compute(predictions=[["    return x + 1\n"]], references=[ADD_ONE])
    for predictions, references, options, message in (
        (["    return x + 1\n"], [ADD_ONE], {}, "one text where a list of completions is needed"),
        ([["x"]], [{**ADD_ONE, "entry_point": None}], {}, "'test/0' has no text in entry_point"),
        ([["x"]], [ADD_ONE, ADD_ONE], {}, "Mismatch"),
        ([["x"]], [ADD_ONE], {"k": []}, "needs at least one number of attempts"),
        ([["x"]], [ADD_ONE], {"k": [1, -1]}, "needs at least one number of attempts"),
    ):
        metric = HumanEvalPassAtK(cache_dir=humaneval.data_dir)
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references, allow_code_execution=True, **options)
