"""Errors for unsupported versions and for damaged indices of weights."""

import importlib.metadata

import pytest
import torch

from hf_phibalance import compat


@pytest.mark.parametrize(
    ("name", "version"), [("transformers", "4.57.1"), ("transformers", "6.0.0"), ("accelerate", "1.2")]
)
def test_an_unsupported_version_is_named_at_import(name, version, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: version if asked == name else real(asked))
    with pytest.raises(ImportError, match=rf"{name} {version}.*pip install '{name}"):
        compat.refuse_unsupported_versions()


def test_the_installed_versions_are_supported():
    compat.refuse_unsupported_versions()


@pytest.mark.parametrize("content", ['{"weight_map": {"a": "model-0', "[]", '{"weight_map": ["a"]}', "{}"])
def test_a_damaged_index_of_weights_is_refused_by_name(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json.*Write the checkpoint again"):
        compat.reload_converted_weights(torch.nn.Linear(1, 1), tmp_path)
