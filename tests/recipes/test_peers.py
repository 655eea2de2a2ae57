"""recipes/environments/peers.py on a few tests of our own: which outcomes differ with balancing, and which models have it."""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT


pytestmark = pytest.mark.slow

TESTS = """
import os
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

BALANCED = os.environ["BALANCED"] == "True"
SIZES = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=16)

def built():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))

def balanced(model):
    return hasattr(model.config, "phi_balance")

def test_built():
    assert balanced(built()) == BALANCED

def test_loaded(tmp_path):
    built().save_pretrained(tmp_path)
    for cls in (AutoModelForCausalLM, MixtralForCausalLM):
        assert balanced(cls.from_pretrained(tmp_path)) == BALANCED

def test_without_routers(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    assert not balanced(model) and not balanced(AutoModelForCausalLM.from_pretrained(tmp_path))

def test_load_balancing_loss():
    assert built().config.output_router_logits

def test_that_always_fails():
    assert False

def test_that_nothing_explains():
    assert not balanced(built())
"""


def outcomes(folder, *options):
    """Exit code of pytest, and the outcome of each test; the key of skipped ones is empty."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'recipes' / 'environments'}:{ROOT}", "BALANCED": str(not options)}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "peers", "--rootdir", str(folder), *options]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    lines = re.findall(r"^([A-Z]+) (?:\[1\] )?test_mixtral.py(?:::test_(\w+))?", run.stdout, re.MULTILINE)
    return run.returncode, {test: outcome for outcome, test in lines}


def test_only_a_difference_that_nothing_explains_fails(tmp_path):
    (tmp_path / "test_mixtral.py").write_text(TESTS)
    alike = dict.fromkeys(["built", "loaded", "without_routers"], "PASSED")
    assert outcomes(tmp_path, "--plain") == (
        1,
        alike | {"load_balancing_loss": "PASSED", "that_nothing_explains": "PASSED", "that_always_fails": "FAILED"},
    )
    assert outcomes(tmp_path) == (
        1,
        alike | {"load_balancing_loss": "XFAIL", "that_nothing_explains": "FAILED", "": "SKIPPED"},
    )
