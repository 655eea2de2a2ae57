"""HumanEval's pass@k: right programs pass, and wrong ones fail."""

import gzip
import json

import pytest
from evaluated import ADD_ONE
from paths import DATA

from hf_phibalance.evaluation import CodeExecutionError, HumanEvalPassAtK, score_humaneval


@pytest.fixture
def humaneval(tmp_path):
    return HumanEvalPassAtK(cache_dir=str(tmp_path))


def humaneval_problems():
    path = DATA / "humaneval" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in {path.parent}")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


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
    references = [ADD_ONE, {**ADD_ONE, "canonical_solution": "    return x + 1\n"}]
    result = humaneval.compute(
        predictions=[completions, ["    return x\n", "    return x + 1"]],
        references=references,
        k=[1, 2, 4],
        timeout=2,
    )
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
        result = score_humaneval(
            [completions], [ADD_ONE], k=[1], timeout=5.0, allow_code_execution=True, unsafe=unsafe
        )
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


def test_all_canonical_solutions_of_humaneval_pass(humaneval):
    problems = humaneval_problems()
    done = []
    result = humaneval.compute(
        predictions=[[problem["canonical_solution"]] for problem in problems],
        references=problems,
        timeout=20.0,  # the machine may be busy with other tests
        allow_code_execution=True,
        progress=lambda *counts: done.append(counts),
    )
    failed = {
        problem["task_id"]: verdicts
        for problem, verdicts in zip(problems, result["results"])
        if not verdicts[0]["passed"]
    }
    assert len(problems) == 164 and not failed
    assert result["pass@1"] == 1.0
    assert done == [(i + 1, 164) for i in range(164)]


def test_wrong_solutions_of_humaneval_fail(humaneval):
    """Prompts that are continued by nothing, and by the solution of the next problem."""
    problems = humaneval_problems()[:12]
    answers = [[["    pass\n"], [next_problem["canonical_solution"]]] for next_problem in problems[1:]]
    result = humaneval.compute(
        predictions=[both[0] + both[1] for both in answers],
        references=problems[:-1],
        k=[1, 2],
        allow_code_execution=True,
    )
    assert result["pass@1"] == result["pass@2"] == 0.0
    assert all(verdict["status"] == "failed" for verdicts in result["results"] for verdict in verdicts)


def test_humaneval_refuses_what_it_cannot_run(humaneval, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(CodeExecutionError, match="HF_ALLOW_CODE_EVAL=1 or pass allow_code_execution=True"):
        humaneval.compute(predictions=[["    return x + 1\n"]], references=[ADD_ONE])
    allowed = {"allow_code_execution": True}
    with pytest.raises(ValueError, match="one text where a list of completions is needed"):
        humaneval.compute(predictions=["    return x + 1\n"], references=[ADD_ONE], **allowed)
    with pytest.raises(ValueError, match="'test/0' has no text in entry_point"):
        humaneval.compute(predictions=[["x"]], references=[{**ADD_ONE, "entry_point": None}], **allowed)
    with pytest.raises(ValueError, match="Mismatch"):
        humaneval.compute(predictions=[["x"]], references=[ADD_ONE, ADD_ONE], **allowed)
    for k in ([], [0], [1, -1]):
        metric = HumanEvalPassAtK(cache_dir=humaneval.data_dir)
        with pytest.raises(ValueError, match="needs at least one number of attempts"):
            metric.compute(predictions=[["x"]], references=[ADD_ONE], k=k, **allowed)
