"""Alerts: every planted fault is found, with its kind, and no healthy run has one. Loads are drawn; real trainings are below."""

import math

import numpy as np
import pytest

from hf_phibalance.watching import Alerts, Thresholds


NAME = "model.layers.0.mlp.gate"
LEARNS = {"learns": "full", "experts": "full", "dtype": "float32", "gradient": True, "unchanged": 0.0}
SHAPES = [(8, 2), (16, 1), (64, 8), (256, 8)]


class Drawn:
    """
    A run of `logs` logs of `every` steps with `tokens` tokens, whose experts have the weights `weights(progress)`. `texts` resemblance:
    all tokens of a step share a factor of this scatter per expert.
    """

    def __init__(self, shape, weights, seed, logs=40, every=10, tokens=512, texts=0.0, steps=100, method="none"):
        self.experts, self.top_k = shape
        self.weights, self.logs, self.every, self.tokens, self.texts = weights, logs, every, tokens, texts
        self.random = np.random.default_rng(seed)
        self.finder = Alerts(
            Thresholds(steps=steps), [{"name": NAME, "experts": self.experts, "top_k": self.top_k}], method
        )

    def shares(self, progress):
        weights = self.weights(progress) * np.exp(self.random.normal(0, self.texts, self.experts))
        return weights / weights.sum()

    def rows(self, even=False, probs=None, **router):
        for number in range(1, self.logs + 1):
            load, mean = np.zeros(self.experts, int), np.zeros(self.experts)
            for _ in range(self.every):
                shares = self.shares(number / self.logs)
                load += self.random.multinomial(self.tokens * self.top_k, shares)
                mean += shares / self.every
            mean = (
                np.full(self.experts, 1 / self.experts) * (1 + self.random.normal(0, 0.003, self.experts))
                if even
                else mean
            )
            figures = {"load": load.tolist(), "probs": mean.tolist() if probs is None else probs}
            step = number * self.every
            yield {
                "step": step,
                "steps": self.every,
                "layers": {NAME: figures | {"router": LEARNS | {"since": step - 1} | router}},
            }

    def alerts(self, **options):
        return [{"step": row["step"], **alert} for row in self.rows(**options) for alert in self.finder.add(row)]


def uneven(experts, scatter, seed):
    weights = np.exp(np.random.default_rng(seed).normal(0, scatter, experts))
    return lambda progress: weights


def dying(experts, to, begins=0.4, lasts=0.0, dead=(3,), scatter=0.5, seed=0):
    """Weights of which those of `dead` experts fall to `to`, from the progress `begins` on."""
    before = uneven(experts, scatter, seed)(0)
    before[list(dead)] = before.mean()

    def weights(progress):
        after = before.copy()
        part = min(max((progress - begins) / lasts, 0), 1) if lasts else progress > begins
        after[list(dead)] *= to**part
        return after

    return weights


def collapsing(experts, left, begins=0.4, lasts=0.0, seed=0):
    """Weights that concentrate on `left` experts."""
    return dying(experts, 0.02, begins, lasts, range(left, experts), 0.3, seed)


def topics(experts, seed):
    """Weights of texts that take turns, log by log: some use all experts alike, others mostly a quarter of them."""
    narrow = np.where(np.arange(experts) < experts // 4, 1.0, 0.1)
    return lambda progress: narrow if math.ceil(progress * 10 - 1e-9) % 2 else np.ones(experts)


HEALTHY = {
    "even": {"weights": lambda e, seed: uneven(e, 0.0, seed)},
    "uneven": {"weights": lambda e, seed: uneven(e, 0.8, seed)},
    "very_uneven": {"weights": lambda e, seed: uneven(e, 1.3, seed)},
    "alike_texts": {"weights": lambda e, seed: uneven(e, 0.6, seed), "texts": 0.8},
    "small_batches": {"weights": lambda e, seed: uneven(e, 0.6, seed), "tokens": 16, "texts": 0.5},
    "one_token": {"weights": lambda e, seed: uneven(e, 0.6, seed), "tokens": 1, "every": 1, "logs": 200},
    "each_step": {"weights": lambda e, seed: uneven(e, 0.8, seed), "every": 1, "logs": 150, "texts": 0.5},
    "rare_logs": {"weights": lambda e, seed: uneven(e, 0.8, seed), "every": 100, "logs": 8},
    "many_tokens": {"weights": lambda e, seed: uneven(e, 0.8, seed), "tokens": 200_000, "logs": 20},
    "topics": {"weights": topics, "every": 100, "logs": 10},
    "one_begins_late": {"weights": lambda e, seed: lambda progress: uneven(e, 0.3, seed)(0) * ((np.arange(e) != 3) + (progress > 0.2))},
    "fading": {"weights": lambda e, seed: dying(e, 0.3, 0.0, 1.0, range(e // 4), seed=seed)},
}  # fmt: skip


@pytest.mark.slow
def test_healthy_runs_have_no_alarm():
    runs, alarms = 0, []
    for name, options in HEALTHY.items():
        for number, shape in enumerate(SHAPES):
            runs += 1
            options = {**HEALTHY[name]}
            weights = options.pop("weights")(shape[0], number)
            alarms += [(name, shape, alert) for alert in Drawn(shape, weights, number, **options).alerts()]
    assert (runs, alarms) == (48, [])


@pytest.mark.parametrize(
    "router",
    [
        {"learns": "frozen", "experts": "lora"},  # LoRA without routers
        {"learns": "frozen", "experts": "frozen"},  # only the head is trained
        {"learns": "lora", "experts": "lora", "dtype": "float32"},
        {"dtype": "bfloat16", "unchanged": 0.3},
        {"unchanged": 1.0, "gradient": None, "since": 50},  # not for long enough
    ],
    ids=str,
)
def test_routers_that_learn_or_are_not_to_have_no_alarm(router):
    assert not Drawn((8, 2), uneven(8, 0.5, 0), 0, logs=30).alerts(**router)


def test_routers_frozen_by_the_method_have_no_alarm():
    run = Drawn((8, 2), uneven(8, 0.5, 0), 0, logs=30, method="frozen")
    assert not run.alerts(learns="frozen")


PLANTED = {
    "killed": ("dead_experts", lambda e, k: dying(e, 0.0)),
    "nearly_killed": ("dead_experts", lambda e, k: dying(e, 0.01)),
    "dies_slowly": ("dead_experts", lambda e, k: dying(e, 0.001, 0.1, 0.6)),
    "several_die": ("dead_experts", lambda e, k: dying(e, 0.01, dead=(1, 2, 5))),
    "dead_from_the_start": ("dead_experts", lambda e, k: dying(e, 0.0, -1.0)),
    "collapses": ("collapsed_layer", lambda e, k: collapsing(e, max(k + 1, e // 4))),
    "collapses_slowly": ("collapsed_layer", lambda e, k: collapsing(e, max(k + 1, e // 4), 0.1, 0.6)),
    "collapses_to_the_same": ("collapsed_layer", lambda e, k: collapsing(e, k)),
}


@pytest.mark.slow
@pytest.mark.parametrize("tokens, texts", [(512, 0.0), (20_000, 0.5)])
def test_planted_collapses_are_found(tokens, texts):
    planted, missed = 0, []
    for name, (kind, weights) in PLANTED.items():
        for number, shape in enumerate(SHAPES):
            planted += 1
            found = Drawn(shape, weights(*shape), number, tokens=tokens, texts=texts).alerts()
            if kind not in {alert["kind"] for alert in found}:
                missed.append((name, shape, found))
            if kind == "dead_experts":
                dead = {expert for alert in found if alert["kind"] == kind for expert in alert["experts"]}
                assert dead == ({1, 2, 5} if name == "several_die" else {3}), (name, shape, found)
    assert (planted, missed) == (32, [])


OTHERS = {
    "frozen": ("unmoved_router", {"learns": "frozen"}, "frozen while its experts are trained in full", 10),
    "no_gradient": ("unmoved_router", {"unchanged": 1.0, "gradient": None}, "no gradient has reached", 110),
    "zero_gradient": ("unmoved_router", {"gradient": False}, "no gradient has reached", 110),
    "no_optimizer": ("unmoved_router", {"unchanged": 1.0}, "it has a gradient, but", 110),
    "rounded": ("unmoved_router", {"unchanged": 0.9, "dtype": "bfloat16"}, "the optimizer's steps are rounded away", 110),
    "even": ("even_probabilities", {"even": True}, "as in new routers", 100),
    "nan": ("not_finite", {"probs": [None] * 8}, "its probabilities are NaN or infinite", 10),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_faults_are_found_once_with_reason_and_remedy(case):
    kind, options, reason, step = OTHERS[case]
    (alert,) = Drawn((8, 2), uneven(8, 1.0, 1), 0, logs=30).alerts(**options)
    assert (alert["kind"], alert["layer"], alert["step"]) == (kind, NAME, step)
    assert reason in alert["reason"] and alert["remedy"]


def test_an_alert_comes_again_only_if_it_had_ended():
    def weights(progress):
        phase = int(progress * 6)  # alive, dead, dead, alive, dead, dead
        return dying(8, 0.001)(float(phase % 3 > 0))

    alerts = Drawn((8, 2), weights, 0, logs=120).alerts()
    assert [alert["kind"] for alert in alerts] == ["dead_experts"] * 2
    assert 200 < alerts[0]["step"] < 400 < 800 < alerts[1]["step"] < 1000


def test_a_second_expert_is_said_alone():
    both = dying(16, 0.001, 0.2), dying(16, 0.001, 0.6, dead=(7,))
    alerts = Drawn((16, 1), lambda progress: both[0](progress) * both[1](progress), 0).alerts()
    assert [alert["experts"] for alert in alerts] == [[3], [7]]


@pytest.mark.parametrize(
    "field, value", [("steps", 0), ("false_alarm", 2), ("collapse", "half"), ("dead_load", math.nan)]
)
def test_thresholds_are_checked(field, value):
    with pytest.raises(ValueError, match=f"`{field}` of Thresholds must be above 0"):
        Thresholds(**{field: value})
