"""tests/helpers/long_run.py, small: nothing grows and nothing drifts, and it is seen where it does."""

import long_run
import pytest

import hf_phibalance as phb


pytestmark = pytest.mark.slow


def exceeded(rows):
    return {row.figure for row in rows if row.found > row.bound and "CPU" not in row.figure}


def test_a_run_of_two_hundred_steps():
    rows = {row.figure: row for row in long_run.run(200)}
    assert exceeded(rows.values()) == set()
    assert rows["mean, off float64"].found > 0 and rows["bias, off float64"].found > 0  # fp32 does round
    assert rows["CPU time of a step, ms"].found < 2  # other processes share the machine


def test_a_leak_and_a_drift_are_seen(monkeypatch):
    step, kept = phb.PhiBalancer.step, []

    def sabotaged(self, *args):
        step(self, *args)
        kept.extend([i] * 100 for i in range(20))
        self.duals.biases[0, 0] += 1e-6

    monkeypatch.setattr(phb.PhiBalancer, "step", sabotaged)
    seen = exceeded(long_run.run(100))
    assert seen == {"Python objects' memory, KiB", "Python objects", "bias, off float64"}
