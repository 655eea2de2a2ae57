"""The generated problems, their tokenizer, the strict-match rule, and the tiny models of the recipes."""

import re

import pytest
import torch
import yaml
from paths import ROOT
from transformers import AutoTokenizer

from hf_phibalance.tasks import toy


RECIPES = sorted((ROOT / "recipes" / "tiny-cpu").glob("*.yaml"))


@pytest.fixture(scope="module")
def splits():
    return toy.make_splits(train=1500, validation=50, test=100, seed=3)


@pytest.fixture(scope="module")
def texts(splits):
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in splits["train"]]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return toy.train_tokenizer(texts)


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
    assert len(openings) >= len(toy.TEMPLATES)


def test_splits_share_no_problem(splits):
    words = re.compile("|".join((*toy.NAMES, *toy.ITEMS, *toy.PLACES, *toy.DAYS)))
    questions = {split: {words.sub("_", row["question"]) for row in rows} for split, rows in splits.items()}
    assert {split: len({row["question"] for row in rows}) for split, rows in splits.items()} == {
        "train": 1500,
        "validation": 50,
        "test": 100,
    }
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not questions[one] & questions[other]


def test_same_seed_same_problems(splits):
    again = toy.make_splits(train=200, validation=50, test=100, seed=3)
    assert again["test"] == splits["test"]
    assert again["validation"] == splits["validation"]
    assert again["train"] == splits["train"][:200]
    assert toy.make_splits(train=200, seed=4)["train"] != again["train"]


def test_too_many_problems_are_refused(monkeypatch):
    template = toy.Template("What is {a} plus {b}?", ("It is [r=a+b].",), {"a": (1, 3), "b": (1, 3)})
    monkeypatch.setattr(toy, "TEMPLATES", (template,))
    assert len(toy.make_splits(train=6, test=3)["train"]) == 6
    with pytest.raises(ValueError, match="train=7 is more than the generator has: ask for at most 6"):
        toy.make_splits(train=7, test=3)


def test_tokenizer_keeps_text_and_splits_digits(tokenizer, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (texts[0], texts[1], "Ünïcode, 1,234.50 € and a\ttab\n"):
            assert reader.decode(reader(text).input_ids) == text
        assert reader(texts[0]).input_ids == tokenizer(texts[0]).input_ids
        assert reader.tokenize("4*16=<<4*16=64>>64")[2:4] == ["1", "6"]
        assert all(len(token) == 1 for token in reader.tokenize(texts[0]) if re.search(r"\d", token))
        assert (reader.eos_token, reader.pad_token, reader.padding_side) == ("</s>", "<pad>", "left")
        assert reader(f"64{reader.eos_token}").input_ids[-1] == reader.eos_token_id


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_model_is_built_from_its_fields(recipe, tokenizer):
    options = yaml.safe_load(recipe.read_text())
    model = toy.build_model(options["model_type"], options["model_config"], tokenizer)
    assert model.config.model_type == options["model_type"]
    assert model.config.hidden_size == options["model_config"]["hidden_size"]
    assert model.config._experts_implementation == options["model_config"]["experts_implementation"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer(["Question: 1+2?", "4"], padding=True, return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_unknown_model_fields_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"model_config has \['hiden_size'\], which MixtralConfig lacks"):
        toy.build_model("mixtral", {"hiden_size": 8}, tokenizer)
    with pytest.raises(ValueError, match="model_type='mixtrall' is unknown"):
        toy.build_model("mixtrall", {}, tokenizer)
