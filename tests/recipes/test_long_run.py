"""recipes/reliability/long_run.py, small: nothing grows and nothing drifts, and the script sees it where it does."""

import importlib

import pytest
from paths import ROOT

import hf_phibalance as phb


@pytest.fixture(scope="module")
def long_run():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes" / "reliability")
        return importlib.import_module("long_run")


def exceeded(findings):
    return {label for label, _, _, value, bound in findings.rows() if value > bound and "CPU" not in label}


def test_a_run_of_two_hundred_steps(long_run):
    findings = long_run.run(200)
    assert exceeded(findings) == set()
    assert findings.mean_error > 0 and findings.bias_error > 0  # fp32 does round
    first, last = long_run._quarters(findings.seconds)
    assert last < 2 * first  # other processes share the machine


def test_a_leak_and_a_drift_are_seen(long_run, monkeypatch):
    step, kept = phb.PhiBalancer.step, []

    def sabotaged(self, *args):
        step(self, *args)
        kept.extend([i] * 100 for i in range(20))
        self.duals.biases[0, 0] += 1e-6

    monkeypatch.setattr(phb.PhiBalancer, "step", sabotaged)
    seen = exceeded(long_run.run(100))
    assert seen == {"Python objects' memory, KiB", "Python objects", "bias, off float64"}
