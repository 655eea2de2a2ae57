"""Scores of generated text: GSM8K's exact match and HumanEval's pass@k, against what others count on the same text."""

import gzip
import itertools
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from paths import DATA
from tiny import tiny_model

import hf_phibalance as phb
from hf_phibalance import evaluation
from hf_phibalance.evaluation import (
    GSM8K_STOPS,
    HUMANEVAL_STOPS,
    CodeExecutionError,
    GSM8KAccuracy,
    HumanEvalPassAtK,
    extract_flexible,
    extract_strict,
    pass_at_k,
    truncate,
)


FOLDER = Path(evaluation.__file__).parent
ADD_ONE = {
    "task_id": "test/0",
    "prompt": "def add_one(x):\n",
    "entry_point": "add_one",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n",
}


@pytest.fixture
def gsm8k(tmp_path):
    return GSM8KAccuracy(cache_dir=str(tmp_path))


@pytest.fixture
def humaneval(tmp_path):
    return HumanEvalPassAtK(cache_dir=str(tmp_path))


def gsm8k_rows(split, count):
    path = DATA / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of GSM8K in {path.parent}")
    with path.open() as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def humaneval_problems():
    path = DATA / "humaneval" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in {path.parent}")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, gold, strict, flexible",
    [
        ("#### 18.", "18", True, True),
        ("#### 18 dollars", "18", True, True),
        ("#### $18", "18", False, True),
        ("####18", "18", False, True),
        ("The answer is 18.", "18", False, True),
        (r"\boxed{18}", "18", False, True),
        ("The answer is $18.00", "18", False, False),
        ("#### 18\n#### 19", "18", True, False),
        ("18 apples and 3 pears", "18", False, False),
        ("#### 1,000.", "1,000", True, True),
        ("#### 1000.0", "1,000", False, False),
        ("", "18", False, False),
        ("no number", "18", False, False),
    ],
)
def test_gsm8k_golden_vectors(gsm8k, text, gold, strict, flexible):
    number = int(gold.replace(",", ""))
    for reference in (gold, f"She has 9 * 2 = <<9*2=18>>18 of them.\n#### {gold}", number, float(number)):
        result = gsm8k.compute(predictions=[text], references=[reference])
        assert result == {"strict_match": float(strict), "flexible_extract": float(flexible)}, reference


def test_what_is_read_from_an_answer():
    assert extract_strict("#### 1 and #### 2") == "1" and extract_strict("#### -1,5.0x") == "-1,5.0"
    assert extract_strict("###  3") == extract_flexible("none") == evaluation.INVALID == "[invalid]"
    assert extract_flexible("3 of 5") == "5" and extract_flexible("5 of $3,0.") == "$3,0."
    assert truncate("#### 1</s>Question: a", GSM8K_STOPS) == "#### 1"
    assert truncate("    return 1\nif x:\n    y\ndef f", HUMANEVAL_STOPS) == "    return 1"
    assert truncate("    if x:\n        print(1)", HUMANEVAL_STOPS) == "    if x:\n        print(1)"


def test_gsm8k_scores_are_shares_and_details_say_why(gsm8k):
    predictions, references = ["#### 18", "it is 7", "#### 1\n2", "x"], ["18", "... #### 7", 1, 5]
    result = gsm8k.compute(predictions=predictions, references=references, details=True)
    assert result["strict_match"] == 0.5 and result["flexible_extract"] == 0.5
    assert result["results"][2] == {
        "strict": "1",
        "flexible": "2",
        "gold": "1",
        "strict_match": True,
        "flexible_extract": False,
    }
    assert json.loads(json.dumps(result)) == result
    for prediction, reference in zip(predictions, references):
        gsm8k.add(prediction=prediction, reference=reference)
    assert gsm8k.compute() == {"strict_match": 0.5, "flexible_extract": 0.5}


def test_gsm8k_refuses_what_it_cannot_score(gsm8k):
    with pytest.raises(TypeError, match="None is a NoneType"):
        gsm8k.compute(predictions=["#### 1"], references=[None])
    with pytest.raises(ValueError, match="Mismatch"):
        gsm8k.compute(predictions=["#### 1"], references=[1, 2])
    with pytest.raises(ValueError):
        GSM8KAccuracy(cache_dir=gsm8k.data_dir).compute(predictions=[], references=[])


def test_every_gold_answer_of_gsm8k_is_right(gsm8k):
    answers = [row["answer"] for split in ("train", "test") for row in gsm8k_rows(split, None)]
    result = gsm8k.compute(predictions=answers, references=answers)
    assert len(answers) > 8000 and result["strict_match"] == 1.0


def perturbed(answer, generator):
    """A completion as a model might write it."""
    reasoning, number = answer.split("#### ")
    wrong = str(generator.randrange(-50, 5000))
    ending = generator.choice(
        [
            f"#### {number}", f"#### {number}.", f"#### ${number}", f"####{number}", f"#### {number}.0", f"#### {wrong}",
            f"#### {number}\n#### {wrong}", f"The answer is {number}.", f"The answer is ${number}.00!", number, wrong,
            f"\\boxed{{{number}}}", f"#### {number} dollars", f"#### {int(number.replace(',', '')):,}", f"#### -{number}",
            "", f"#### {number},", f"#### {number}..", f"#### .{number}", "#### ,", "#### .", f"**{number}**",
            f"#### {number}%", f"#### \n{number}", f"####  {number}", "$", "$.", "--5", f"${number}$", f"{number}\n\n",
            f"#### {number} #### {wrong}", f"{wrong}#### {number}", f"#### {number.replace(',', ' ')}", "#### NaN",
        ]
    )  # fmt: skip
    return generator.choice([reasoning, "", reasoning[: len(reasoning) // 2]]) + ending


def completions_of_gsm8k():
    generator = random.Random(0)
    rows = gsm8k_rows("test", 500)
    texts = [perturbed(row["answer"], generator) for row in rows]
    noise = ["".join(generator.choices("0123456789.,$-# \n abÄ#### ", k=generator.randrange(40))) for _ in rows]
    for i, row in enumerate(rows[:100]):
        noise[i] += row["answer"].split("####")[1]
    return rows * 2, texts + noise


def test_gsm8k_scores_are_those_of_lm_evaluation_harness(gsm8k, tmp_path, monkeypatch):
    """The harness's own task, filters and metric, on completions that a stand-in for a model gives."""
    lm_eval = pytest.importorskip("lm_eval")
    yaml = pytest.importorskip("yaml")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    rows, completions = completions_of_gsm8k()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))
    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    del config["tag"], config["dataset_name"], config["training_split"], config["fewshot_split"]
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}
    config |= {"dataset_path": "json", "dataset_kwargs": files, "num_fewshot": 0}

    class Recorded(LM):
        def generate_until(self, requests, disable_tqdm=False):
            assert all(tuple(request.args[1]["until"]) == GSM8K_STOPS for request in requests)
            return [completions[request.doc["id"]] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    theirs = lm_eval.simple_evaluate(
        Recorded(),
        tasks=[config],
        task_manager=TaskManager(include_defaults=False),  # else it reads the files of all its tasks
        log_samples=True,
        bootstrap_iters=0,
    )
    ours = gsm8k.compute(predictions=completions, references=[row["answer"] for row in rows], details=True)
    (samples,) = theirs["samples"].values()
    assert len(samples) == 2 * len(completions)
    for sample in samples:
        name = {"strict-match": "strict_match", "flexible-extract": "flexible_extract"}[sample["filter"]]
        verdict = ours["results"][sample["doc"]["id"]]
        assert bool(sample["exact_match"]) == verdict[name], (sample["resps"], sample["target"], verdict)
    (scores,) = theirs["results"].values()
    assert scores["exact_match,strict-match"] == pytest.approx(ours["strict_match"], abs=1e-12)
    assert scores["exact_match,flexible-extract"] == pytest.approx(ours["flexible_extract"], abs=1e-12)
    assert 0.1 < ours["strict_match"] < ours["flexible_extract"] < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval
# ---------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            verdicts = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
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
    assert json.loads(json.dumps(result)) == result


def test_all_canonical_solutions_of_humaneval_pass_in_time(humaneval):
    problems = humaneval_problems()
    done = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
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
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # what a busy machine does not change
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


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


# ---------------------------------------------------------------------------------------------------------------------
# As metrics of `evaluate`, and with the models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{0}", "{0}/{0}.py"])
def test_both_metrics_load_by_path(form, tmp_path, monkeypatch):
    import evaluate
    import evaluate.loading

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(evaluate.loading, "init_dynamic_modules", lambda: str(tmp_path / "loaded_modules"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loaded_modules").mkdir()
    (tmp_path / "loaded_modules" / "__init__.py").touch()
    try:
        gsm8k = evaluate.load(str(FOLDER / form.format("gsm8k_accuracy")))
        humaneval = evaluate.load(str(FOLDER / form.format("humaneval_pass_at_k")))
    finally:
        for name in [name for name in sys.modules if name.startswith("loaded_modules")]:
            del sys.modules[name]
    assert isinstance(gsm8k, evaluate.Metric) and isinstance(humaneval, evaluate.Metric)
    assert gsm8k.compute(predictions=["#### 18."], references=["18"]) == {"strict_match": 1.0, "flexible_extract": 1.0}
    result = humaneval.compute(predictions=[["    return x + 1"]], references=[ADD_ONE], allow_code_execution=True)
    assert result["pass@1"] == 1.0 and result["results"][0][0]["passed"]


def test_the_package_does_not_import_evaluate():
    code = (
        "import sys, hf_phibalance\n"
        "assert 'hf_phibalance.evaluation' not in sys.modules\n"
        "import hf_phibalance.evaluation as evaluation\n"
        "assert evaluation.truncate('a</s>b', evaluation.GSM8K_STOPS) == 'a'\n"
        "assert 'evaluate' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_without_evaluate_the_error_names_the_extra(monkeypatch):
    for name in ("GSM8KAccuracy", "HumanEvalPassAtK"):
        monkeypatch.delitem(evaluation.__dict__, name, raising=False)
        monkeypatch.setitem(sys.modules, "evaluate", None)
        with pytest.raises(ImportError, match=r'pip install "hf_phibalance\[recipes\]"'):
            getattr(evaluation, name)
        assert name in dir(evaluation)
    with pytest.raises(AttributeError, match="no attribute 'Bleu'"):
        evaluation.Bleu  # noqa: B018


def test_a_patched_model_goes_to_lm_evaluation_harness_as_it_is(tmp_path):
    """Its log-likelihoods are the model's own, it generates, and evaluation leaves the duals alone."""
    pytest.importorskip("lm_eval")
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from hf_phibalance.models import train_tokenizer

    texts = [f"Question: {i} and {j}?\nAnswer: {i + j}" for i in range(9) for j in range(9)]
    tokenizer = train_tokenizer(texts, max_length=64)
    model = phb.patch(tiny_model("mixtral", vocab_size=len(tokenizer)), phb.PhiBalanceConfig(coef=0.01))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    before = {name: value.clone() for name, value in phb.get_balancer(model).state_dict().items()}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    assert harness.model is model

    pairs = [("Question: 1 and 2?\nAnswer:", " 3"), ("Question: 4 and 4?\nAnswer:", " 8"), ("Question: 1", " and 1?")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, scores):
        start = tokenizer(context, add_special_tokens=False)["input_ids"]
        both = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([both])).logits.log_softmax(-1)[0]
        expected = sum(float(logits[at - 1, both[at]]) for at in range(len(start), len(both)))
        assert score == pytest.approx(expected, abs=1e-4)

    arguments = ("Question: 1 and 2?\nAnswer:", {"until": list(GSM8K_STOPS), "max_gen_toks": 8, "do_sample": False})
    (answer,) = harness.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    inputs = tokenizer(arguments[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == truncate(tokenizer.decode(tokens, skip_special_tokens=True), GSM8K_STOPS)
    after = phb.get_balancer(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
