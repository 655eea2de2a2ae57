"""The made problems: right, all different, and the same for the same seed."""

import re

import pytest

from hf_phibalance.tasks import made


@pytest.fixture(scope="module")
def splits():
    return made.make_splits(train=1500, validation=50, test=100, seed=3)


def test_calculations_are_right_and_chain_to_the_answer(splits):
    for row in splits["train"]:
        results = []
        for written, term, result, shown in re.findall(
            r"([0-9+*/-]+)=\$?<<([0-9+*/-]+)=([0-9]+)>>([0-9]+)", row["answer"]
        ):
            assert written == term
            assert result == shown
            assert eval(term) == int(result)
            results.append(result)
        assert len(results) == row["answer"].count("<<") in (2, 3)
        assert row["answer"].splitlines()[-1] == f"#### {results[-1]}"


def test_numbers_come_from_the_question_or_an_earlier_step(splits):
    for row in splits["train"]:
        known = set(re.findall(r"[0-9]+", row["question"]))
        words = {"half": "2", "twice": "2"}
        known |= {number for word, number in words.items() if word in row["question"]}
        for left, right, result in re.findall(r"<<([0-9]+)[+*/-]([0-9]+)=([0-9]+)>>", row["answer"]):
            assert {left, right} <= known
            known.add(result)


def test_all_templates_are_drawn_and_filled(splits):
    assert not any("{" in row["question"] + row["answer"] or "[" in row["answer"] for row in splits["train"])
    openings = {re.sub(r"[A-Z][a-z]+|\d+", "", row["question"])[-30:] for row in splits["train"]}
    assert len(openings) >= len(made.TEMPLATES)


def test_splits_share_no_problem(splits):
    words = re.compile("|".join((*made.NAMES, *made.ITEMS, *made.PLACES, *made.DAYS)))
    questions = {split: {words.sub("_", row["question"]) for row in rows} for split, rows in splits.items()}
    assert {split: len({row["question"] for row in rows}) for split, rows in splits.items()} == {
        "train": 1500,
        "validation": 50,
        "test": 100,
    }
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not questions[one] & questions[other]


def test_same_seed_same_problems(splits):
    again = made.make_splits(train=200, validation=50, test=100, seed=3)
    assert again["test"] == splits["test"]
    assert again["validation"] == splits["validation"]
    assert again["train"] == splits["train"][:200]
    assert made.make_splits(train=200, seed=4)["train"] != again["train"]


def test_too_many_problems_are_refused(monkeypatch):
    template = made.Template("What is {a} plus {b}?", ("It is [r=a+b].",), {"a": (1, 3), "b": (1, 3)})
    monkeypatch.setattr(made, "TEMPLATES", (template,))
    assert len(made.make_splits(train=6, test=3)["train"]) == 6
    with pytest.raises(ValueError, match="train=7 is more than the generator has: ask for at most 6"):
        made.make_splits(train=7, test=3)
