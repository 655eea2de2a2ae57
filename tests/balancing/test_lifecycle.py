"""
Anything in any order: patching, adapters, copies, files, failures, other models, while the duals follow the reference.

The same for as many more examples as one likes: `python recipes/reliability/lifecycle.py --examples 500`.
"""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from life import Life


pytestmark = pytest.mark.slow


SETTINGS = settings(
    derandomize=True,
    max_examples=7,
    stateful_step_count=10,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # what fails is shown as it is; the script shrinks it
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_the_life_of_a_model(model_type):
    machine = type(f"Life_{model_type}", (Life,), {"model_type": model_type})
    run_state_machine_as_test(machine, settings=SETTINGS)
