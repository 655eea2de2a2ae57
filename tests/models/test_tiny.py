"""The tokenizer that is trained on the spot, and the tiny models of the recipes."""

import re

import pytest
import torch
import yaml
from paths import ROOT
from transformers import AutoTokenizer

from hf_phibalance.models import build_model, train_tokenizer
from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow


RECIPES = sorted((ROOT / "recipes" / "tiny-cpu").glob("*.yaml"))


@pytest.fixture(scope="module")
def texts():
    rows = make_splits(train=1500, validation=50, test=100, seed=3)["train"]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts)


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
    model = build_model(options["model_type"], options["model_config"], tokenizer)
    assert model.config.model_type == options["model_type"]
    assert model.config.hidden_size == options["model_config"]["hidden_size"]
    assert model.config._experts_implementation == options["model_config"]["experts_implementation"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer(["Question: 1+2?", "4"], padding=True, return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_unknown_model_fields_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"model_config has \['hiden_size'\], which MixtralConfig lacks"):
        build_model("mixtral", {"hiden_size": 8}, tokenizer)
    with pytest.raises(ValueError, match="model_type='mixtrall' is unknown"):
        build_model("mixtrall", {}, tokenizer)
