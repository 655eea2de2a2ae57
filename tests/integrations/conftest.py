"""Results of the tool tests go into pytest's report (`--junitxml`), and from there into the README's table of tools."""

import importlib.metadata

import pytest


@pytest.fixture
def table_row(request, record_property):
    """
    `table_row(model=..., trains=..., batches=..., coefficient=...)`: the row of a test, which `recipes/environments/table.py`
    writes if the test passes.
    """

    def note(**columns):
        tool = request.module.TOOL
        columns["tool"] = f"{tool} {importlib.metadata.version(tool)}"
        columns["transformers"] = importlib.metadata.version("transformers")
        for name, value in columns.items():
            record_property(name, value)

    return note
