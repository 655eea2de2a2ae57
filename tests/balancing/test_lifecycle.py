"""
Anything in any order: patching, adapters, copies, files, failures, other models, while the duals follow the reference.

More and longer examples, shrunk where one fails: `PHB_EXAMPLES=500 python -m pytest tests/balancing/test_lifecycle.py`.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from life import Life


pytestmark = pytest.mark.slow

LONGER = "PHB_EXAMPLES" in os.environ
SETTINGS = settings(
    derandomize=True,
    max_examples=int(os.environ.get("PHB_EXAMPLES", 7)),
    stateful_step_count=20 if LONGER else 10,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink) if LONGER else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_the_life_of_a_model(model_type):
    machine = type(f"Life_{model_type}", (Life,), {"model_type": model_type})
    run_state_machine_as_test(machine, settings=SETTINGS)
