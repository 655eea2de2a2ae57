"""Shared by the tests of the comparison: its modules, and made-up text."""

import importlib

import pytest
import torch
from paths import ROOT


MODULES = (
    *("command", "corpus", "documents", "finished", "loop", "measures", "models", "paired", "plans", "records", "run"),
    *("streams", "tables", "unfinished", "workers"),
    *(
        f"finetuning.{name}"
        for name in ("bases", "command", "exercises", "finished", "functions", "grading", "material")
    ),
    *(f"finetuning.{name}" for name in ("plans", "run", "tables", "tuning", "ways")),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def house():
    """The modules of the recipe by name. Its folder is on the path for a while only: a library has the name of a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        yield {name: importlib.import_module(f"compare.{name}") for name in MODULES}


@pytest.fixture(scope="module")
def documents():
    """Made-up documents of three domains, each with words of its own and a number that says which document it is."""
    words = {"problems": "apples pens 3 4 = 12", "prose": "the river and the town", "python": "def self return import"}
    return {
        domain: [" ".join(f"{text} {domain}{i}" for _ in range(12)) for i in range(120)]
        for domain, text in words.items()
    }


@pytest.fixture(scope="module")
def corpus(house, documents, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(house["corpus"], "read_documents", lambda source: documents)
        return house["corpus"].build_corpus("made up", 16, 300, 12, tmp_path_factory.mktemp("text"))
