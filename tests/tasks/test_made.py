"""Generated problems: their arithmetic is right, splits share none, and a seed always gives the same ones."""

import re

import pytest

from hf_phibalance.tasks import made


@pytest.fixture(scope="module")
def splits():
    return made.make_splits(train=1500, validation=50, test=100, seed=3)


@pytest.mark.slow
def test_calculations_are_right_and_chain_to_the_answer(splits):
    """Each number comes from the question or from an earlier step."""
    step = r"([0-9+*/-]+)=\$?<<(([0-9]+)[+*/-]([0-9]+))=([0-9]+)>>([0-9]+)"
    for row in splits["train"]:
        known = set(re.findall(r"[0-9]+", row["question"]))
        known |= {number for word, number in {"half": "2", "twice": "2"}.items() if word in row["question"]}
        steps = re.findall(step, row["answer"])
        assert len(steps) == row["answer"].count("<<") in (2, 3)
        for written, term, left, right, result, shown in steps:
            assert written == term and result == shown and eval(term) == int(result)
            assert {left, right} <= known
            known.add(result)
        assert row["answer"].splitlines()[-1] == f"#### {steps[-1][4]}"
        assert "{" not in row["question"] + row["answer"] and "[" not in row["answer"]
    openings = {re.sub(r"[A-Z][a-z]+|\d+", "", row["question"])[-30:] for row in splits["train"]}
    assert len(openings) >= len(made.TEMPLATES)


def test_splits_share_no_problem(splits):
    words = re.compile("|".join((*made.NAMES, *made.ITEMS, *made.PLACES, *made.DAYS)))
    questions = {split: {words.sub("_", row["question"]) for row in rows} for split, rows in splits.items()}
    sizes = {split: len({row["question"] for row in rows}) for split, rows in splits.items()}
    assert sizes == {"train": 1500, "validation": 50, "test": 100}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not questions[one] & questions[other]


def test_same_seed_same_problems(splits):
    again = made.make_splits(train=200, validation=50, test=100, seed=3)
    assert again["test"] == splits["test"] and again["validation"] == splits["validation"]
    assert again["train"] == splits["train"][:200]
    assert made.make_splits(train=200, seed=4)["train"] != again["train"]


def test_too_many_problems_are_refused(monkeypatch):
    template = made.Template("What is {a} plus {b}?", "It is [r=a+b].", {"a": (1, 3), "b": (1, 3)})
    monkeypatch.setattr(made, "TEMPLATES", (template,))
    assert len(made.make_splits(train=6, test=3)["train"]) == 6
    with pytest.raises(ValueError, match="train=7 is more than the generator has: ask for at most 6"):
        made.make_splits(train=7, test=3)
