"""What the tests of exports share: saved models with a selection bias, and texts."""

import pytest
from made_texts import make_tokenizer, words
from steered import with_bias


@pytest.fixture
def saved(tmp_path):
    """Saves a patched model with its tokenizer and returns the folder."""

    def save(model_type="mixtral", **overrides):
        folder = tmp_path / model_type
        with_bias(model_type, **overrides).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def text(tmp_path):
    """A file of eight documents of 60 words."""
    rows = "".join(f'{{"text": "{words(60, seed=seed)}"}}\n' for seed in range(8))
    (tmp_path / "text.jsonl").write_text(rows)
    return str(tmp_path / "text.jsonl")
