"""What is said of versions that are not supported."""

import importlib.metadata

import pytest

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
