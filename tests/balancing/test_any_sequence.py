"""Any sequence of steps, ordinary, extreme and broken, through `Duals.update`: what holds of means, prices and biases."""

import pytest
import torch
from driven import ExactMeans, counts_of, make_duals, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_phibalance import POTENTIALS
from hf_phibalance.balancing.duals import LOGIT_WIDTH


pytestmark = pytest.mark.slow


SIZES = [[8, 8, 8], [2, 64, 64, 3], [512], [5, 1]]
STEPS = [
    "even",
    "skewed",
    "one_expert",
    "one_token",
    "dead_half",
    "many_tokens",
    "no_token",
    "one_router",
    "nan",
    "inf",
]
STRENGTHS = st.sampled_from([0.0, 0.001, 0.1, 1.0, 100.0])
EXTREMES = {name: [v.low, v.high] if v.parameter else [] for name, v in POTENTIALS.items()}


@st.composite
def potentials(draw):
    name = draw(st.sampled_from(sorted(POTENTIALS)))
    parameter = POTENTIALS[name].parameter
    value = draw(st.sampled_from([None, *EXTREMES[name]]))
    return {"potential": name, "potential_kwargs": {} if value is None else {parameter: value}}


@st.composite
def configs(draw):
    method = draw(st.sampled_from(["phi", "phi", "phi", "switch", "loss_free", "quantile"]))
    if method == "phi":
        statistic = st.sampled_from(["probs", "load"])
        return {
            "coef": draw(STRENGTHS),
            "bias_coef": draw(STRENGTHS),
            "ema_rate": draw(st.sampled_from([0.0001, 0.01, 0.3, 1.0])),
            "track": draw(statistic),
            "bias_track": draw(statistic),
            **draw(potentials()),
        }
    if method == "switch":
        return {"method": method, "coef": draw(STRENGTHS), "bias_coef": draw(STRENGTHS)}
    return {
        "method": method,
        "bias_coef": draw(st.sampled_from([0.001, 0.3, 1.0] + [100.0] * (method == "loss_free"))),
    }


def make_step(duals, kind, seed):
    """Counts of a step of that kind."""
    draw = torch.Generator().manual_seed(seed)
    probs, load, scores = [], [], []
    for index, (site, bias) in enumerate(zip(duals.sites, rows_of(duals, duals.biases))):
        experts, tokens = site.num_experts, {"one_token": 1, "many_tokens": 64}.get(kind, 32)
        logits = torch.randn(tokens, experts, generator=draw) * {"even": 0.01}.get(kind, 2.0)
        if kind == "one_expert":
            logits[:, seed % experts] = 60.0
        if kind == "dead_half":
            logits[:, : experts // 2] = -torch.inf
        score = logits.softmax(-1) if site.score_width else logits
        chosen = (score + bias).topk(site.top_k).indices
        count = torch.bincount(chosen.flatten(), minlength=experts).float()
        seen = float(kind != "no_token" and (kind != "one_router" or index == seed % len(duals.sites)))
        scale = seen * (1e9 if kind == "many_tokens" else 1.0)
        probs.append(scale * logits.softmax(-1).sum(0))
        load.append(scale * count)
        scores.append(score[: tokens if seen else 0])
    counts = counts_of(duals, probs, load, scores if duals.config.rules.bias_rule == "quantile" else ())
    if kind in ("nan", "inf"):
        counts.flat[seed % len(counts.flat)] = float(kind)
    return counts


def assert_inside_bounds(duals, exact):
    rate, potential = duals.config.ema_rate, duals.config.build_potential()
    tolerance = 2**-24 / rate + 2**-20
    for name, means in exact.means.items():
        for mean, expected in zip(rows_of(duals, duals.mean(name)), means):
            assert (mean >= 0).all() and (mean <= 1 + tolerance).all()
            assert abs(float(mean.double().sum()) - 1) <= tolerance
            assert (mean.double() - expected).abs().max() <= tolerance
    for price in rows_of(duals, duals.price.double()):
        ends = potential.grad(torch.tensor([0.0, float(len(price))], dtype=torch.float64))
        assert torch.isfinite(price).all()
        assert price.max() - price.min() <= (ends[1] - ends[0]) * (1 + 1e-4)
    reach = duals.sites[0].score_width or LOGIT_WIDTH
    assert torch.isfinite(duals.biases).all()
    for bias in rows_of(duals, duals.biases):
        assert (bias - bias.mean()).abs().max() <= reach * (1 + 1e-4)
    padding = [row[site.num_experts :] for values in duals.values for row, site in zip(values, duals.sites)]
    assert not any(row.any() for row in padding)


@pytest.mark.parametrize("width", [1.0, None], ids=["scores", "logits"])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=configs(),
    sizes=st.sampled_from(SIZES),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 10**6), st.integers(1, 10)), max_size=12),
)
def test_every_sequence_stays_inside_the_bounds(width, config, sizes, steps):
    if config.get("method") == "quantile":
        sizes = [size for size in sizes if size > 2]
    duals = make_duals(config, sizes, width=width)
    exact = ExactMeans(duals)
    for kind, seed, times in steps:
        for turn in range(times):
            counts = make_step(duals, kind, seed + turn)
            before = duals.values.clone()
            duals.update(counts)
            if kind in ("nan", "inf", "no_token"):
                assert torch.equal(duals.values[[0, 1, 3]], before[[0, 1, 3]])  # means and biases
            else:
                exact.update(counts)
            assert_inside_bounds(duals, exact)


@pytest.mark.parametrize("potential", sorted(POTENTIALS))
@pytest.mark.parametrize("track", ["probs", "load"])
def test_every_potential_is_driven(potential, track):
    """What the property test draws from, one after another: nobody is left out by chance."""
    for value in [None, *EXTREMES[potential]]:
        kwargs = {} if value is None else {POTENTIALS[potential].parameter: value}
        duals = make_duals(
            {"potential": potential, "potential_kwargs": kwargs, "track": track, "bias_track": track, "coef": 100.0}
            | {"bias_coef": 100.0},
            [512, 512],
        )
        exact = ExactMeans(duals)
        for turn in range(40):
            counts = make_step(duals, STEPS[turn // 2 % 7], turn)
            duals.update(counts)
            exact.update(counts)
            assert_inside_bounds(duals, exact)
