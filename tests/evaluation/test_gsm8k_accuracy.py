"""GSM8K's exact match, as lm-evaluation-harness counts it on the same text."""

import itertools
import json
import random
from pathlib import Path

import pytest
from evaluated import recorded
from paths import DATA

from hf_phibalance.evaluation import GSM8K_STOPS, INVALID, GSM8KAccuracy, extract_flexible, extract_strict, truncate


@pytest.fixture
def gsm8k(tmp_path):
    return GSM8KAccuracy(cache_dir=str(tmp_path))


def gsm8k_rows(split, count):
    path = DATA / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of GSM8K in {path.parent}")
    with path.open() as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def test_what_is_read_from_an_answer():
    assert extract_strict("#### 1 and #### 2") == "1" and extract_strict("#### -1,5.0x") == "-1,5.0"
    assert extract_strict("###  3") == extract_flexible("none") == INVALID == "[invalid]"
    assert extract_flexible("3 of 5") == "5" and extract_flexible("5 of $3,0.") == "$3,0."
    assert truncate("#### 1</s>Question: a", GSM8K_STOPS) == "#### 1"
    assert truncate("    return 1\nif x:\n    y\ndef f", ("\ndef", "\nif")) == "    return 1"


@pytest.mark.slow
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


def test_gsm8k_scores_are_shares_and_details_say_why(gsm8k):
    predictions, references = ["#### 18", "it is 7", "#### 1\n2", "x"], ["18", "... #### 7", 1, 5]
    result = gsm8k.compute(predictions=predictions, references=references, details=True)
    assert result["strict_match"] == 0.5 and result["flexible_extract"] == 0.5
    read = {"strict": "1", "flexible": "2", "gold": "1"}
    assert result["results"][2] == {**read, "strict_match": True, "flexible_extract": False}
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_gsm8k_scores_are_those_of_lm_evaluation_harness(gsm8k, tmp_path):
    """The harness's own task, filters and metric, on completions that a stand-in for a model gives."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    generator = random.Random(0)
    rows = gsm8k_rows("test", 500)
    completions = [perturbed(row["answer"], generator) for row in rows]
    noise = ["".join(generator.choices("0123456789.,$-# \n abÄ#### ", k=generator.randrange(40))) for _ in rows]
    completions += [
        text + row["answer"].split("####")[1] * (i < 100) for i, (text, row) in enumerate(zip(noise, rows))
    ]
    rows *= 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml")
    del config["tag"], config["dataset_name"], config["training_split"], config["fewshot_split"]
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}
    config |= {"dataset_path": "json", "dataset_kwargs": files, "num_fewshot": 0}
    manager = TaskManager(include_defaults=False)  # else it reads the files of all its tasks
    theirs = lm_eval.simple_evaluate(
        recorded(completions), tasks=[config], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    ours = gsm8k.compute(predictions=completions, references=[row["answer"] for row in rows], details=True)
    (samples,) = theirs["samples"].values()
    assert len(samples) == 2 * len(completions)
    for sample in samples:
        assert set(sample["arguments"][0][1]["until"]) == set(GSM8K_STOPS)
        name = {"strict-match": "strict_match", "flexible-extract": "flexible_extract"}[sample["filter"]]
        verdict = ours["results"][sample["doc"]["id"]]
        assert bool(sample["exact_match"]) == verdict[name], (sample["resps"], sample["target"], verdict)
    (scores,) = theirs["results"].values()
    assert scores["exact_match,strict-match"] == pytest.approx(ours["strict_match"], abs=1e-12)
    assert scores["exact_match,flexible-extract"] == pytest.approx(ours["flexible_extract"], abs=1e-12)
    assert 0.1 < ours["strict_match"] < ours["flexible_extract"] < 0.9
