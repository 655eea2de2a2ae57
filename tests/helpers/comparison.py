"""The modules of recipes/compare, and a run that takes a second."""

# ruff: noqa: F401

import importlib.util
import sys

from paths import ROOT


sys.path.append(str(ROOT / "recipes"))  # last, since some scripts there are named like libraries

from compare import capacity, exercises, finetune, harness, measures, models, real, scratch, tables, text, training


def load_command():
    """Returns the module recipes/compare.py. The package beside it has the same name."""
    spec = importlib.util.spec_from_file_location("compare_command", ROOT / "recipes" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_run(**fields):
    sizes = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    shape = {"rows": 6, "window": 16, "model_fields": {**sizes, "num_local_experts": 8}, "corpus": "x", "steps": 8}
    return scratch.Run(**{"model": "mixtral", "stream": "mixed", "method": {"method": "none"}, **shape, **fields})
