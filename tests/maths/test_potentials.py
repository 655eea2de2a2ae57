"""Every potential against its textbook form, autograd, and the definitions of convexity and conjugacy."""

import copy
import math
import pickle
import re

import pytest
import torch

from hf_phibalance.maths.potentials import MAX_DISCOUNT, POTENTIALS, centred_price, get_potential


NUM_EXPERTS = 8

VARIANTS = [(name, {}) for name in POTENTIALS] + [
    ("tsallis", {"alpha": 0.0}),
    ("tsallis", {"alpha": 0.3}),
    ("tsallis", {"alpha": 0.999999}),
    ("tsallis", {"alpha": 4.0}),
    ("lp", {"p": 1.01}),
    ("lp", {"p": 1.5}),
    ("pseudo_huber", {"delta": 0.3}),
    ("log_cosh", {"delta": 2.5}),
    ("softplus", {"delta": 0.4}),
]

# f up to terms that are constant on the simplex, in units of f''(1) = 1
TEXTBOOK = {
    "neg_entropy": lambda r: r * math.log(r),
    "tsallis": lambda r, alpha: (r**alpha - r) / (alpha - 1) / alpha,
    "hellinger": lambda r: 2 * (math.sqrt(r) - 1) ** 2,
    "log_barrier": lambda r: -math.log(r),
    "lp": lambda r, p: r**p / (p * (p - 1)),
    "l2": lambda r: r**2 / 2,
    "l3": lambda r: r**3 / 6,
    "pseudo_huber": lambda r, delta: delta**2 * (math.sqrt(1 + ((r - 1) / delta) ** 2) - 1),
    "log_cosh": lambda r, delta: delta**2 * math.log(math.cosh((r - 1) / delta)),
    "softplus": lambda r, delta: 4 * delta**2 * math.log1p(math.exp((r - 1) / delta)),
}


all_variants = pytest.mark.parametrize(
    "potential",
    [get_potential(name, **kwargs) for name, kwargs in VARIANTS],
    ids=["-".join([name, *map(str, kwargs.values())]) for name, kwargs in VARIANTS],
)


def loads(num_points, concentration=1.0, seed=0):
    """Random relative loads `(num_points, NUM_EXPERTS)` in fp64; every row sums to the number of experts."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_points, NUM_EXPERTS, generator=generator, dtype=torch.float64).log().neg()
    weights = weights**concentration
    return NUM_EXPERTS * weights / weights.sum(-1, keepdim=True)


def test_registry_spans_the_families_of_the_ablation():
    assert len(POTENTIALS) >= 9
    assert {variant.family for variant in POTENTIALS.values()} == {"entropy", "norm", "robust"}
    for name, variant in POTENTIALS.items():
        potential = get_potential(name)
        assert (potential.name, potential.family) == (name, variant.family)
        assert variant.low <= variant.default <= variant.high


@pytest.mark.parametrize("name", POTENTIALS)
def test_phi_is_the_textbook_potential(name):
    assert set(TEXTBOOK) == set(POTENTIALS)
    variant = POTENTIALS[name]
    values = [variant.default, 0.7 * variant.default + 0.7] if variant.parameter else [None]
    for value in values:
        kwargs = {} if value is None else {variant.parameter: value}
        potential = get_potential(name, **kwargs)
        r = loads(5).clamp(min=0.02)
        r = NUM_EXPERTS * r / r.sum(-1, keepdim=True)
        expected = [
            sum(TEXTBOOK[name](x, **kwargs) - TEXTBOOK[name](1.0, **kwargs) for x in row) for row in r.tolist()
        ]
        assert potential.phi(r).tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@all_variants
def test_units_at_balance(potential):
    one = torch.ones(NUM_EXPERTS, dtype=torch.float64, requires_grad=True)
    slope = potential.grad(one)
    (curvature,) = torch.autograd.grad(slope.sum(), one)
    assert potential.phi(one).item() == pytest.approx(0.0, abs=1e-12)
    assert slope.tolist() == pytest.approx([0.0] * NUM_EXPERTS, abs=1e-12)
    assert curvature.tolist() == pytest.approx([1.0] * NUM_EXPERTS)


@all_variants
def test_grad_is_the_gradient_of_phi(potential):
    r = loads(20, concentration=2.0)
    r[0, 0], r[1, 1] = 0.0, potential.floor / 2  # dead, and on the tangent
    r.requires_grad_()
    (expected,) = torch.autograd.grad(potential.phi(r).sum(), r)
    torch.testing.assert_close(potential.grad(r), expected, rtol=1e-9, atol=1e-10)


@all_variants
def test_strictly_convex(potential):
    a, b = loads(200, seed=1), loads(200, seed=2)
    chord = (potential.phi(a) + potential.phi(b)) / 2
    assert (potential.phi((a + b) / 2) < chord).all()

    r = torch.linspace(potential.floor + 1e-3, NUM_EXPERTS, 400, dtype=torch.float64, requires_grad=True)
    (curvature,) = torch.autograd.grad(potential.grad(r).sum(), r)
    assert (curvature > 0).all()


@all_variants
def test_minimum_on_the_simplex_is_uniform(potential):
    near, far = 1 + 1e-3 * (loads(100) - 1), loads(100, concentration=3.0)
    at_uniform = potential.phi(torch.ones(NUM_EXPERTS, dtype=torch.float64))
    assert (potential.phi(near) > at_uniform).all()
    assert (potential.phi(far) > at_uniform + 0.1).all()


@all_variants
def test_fenchel_young(potential):
    r, other = loads(50, seed=3), loads(50, seed=4)
    q = potential.grad(r)
    value = potential.phi(r) + potential.conjugate(q)
    torch.testing.assert_close(value, (r * q).sum(-1), rtol=1e-8, atol=1e-8)
    assert (potential.phi(other) + potential.conjugate(q) > (other * q).sum(-1)).all()


@all_variants
def test_grad_conjugate_inverts_grad(potential):
    r = loads(50, seed=5).clamp(
        min=0.02, max=4.0
    )  # a high power is flat near 0, tanh far from 1: inverses lose digits
    torch.testing.assert_close(potential.grad_conjugate(potential.grad(r)), r, rtol=1e-6, atol=1e-9)
    dead = torch.zeros(3, dtype=torch.float64)
    assert potential.grad_conjugate(potential.grad(dead)).tolist() == pytest.approx(
        [potential.floor] * 3, rel=1e-6, abs=1e-4
    )


@all_variants
def test_conjugate_is_the_supremum(potential):
    grid = torch.cat([torch.zeros(1), torch.logspace(-9, 1, 40_000)]).double().unsqueeze(-1)
    prices = potential.grad(torch.tensor([0.02, 0.3, 1.0, 2.5], dtype=torch.float64))
    below_every_price = potential.grad(torch.zeros(1, dtype=torch.float64)) - 3.0
    for q in torch.cat([prices, below_every_price]):
        attained = (grid[:, 0] * q - potential.phi(grid)).max().item()
        claimed = potential.conjugate(q.unsqueeze(0)).item()
        assert attained <= claimed + 1e-9
        assert attained == pytest.approx(claimed, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in POTENTIALS if math.isfinite(get_potential(name).price_limit)])
def test_no_load_explains_a_price_beyond_the_limit(name):
    potential = get_potential(name)
    q = torch.tensor([0.1, potential.price_limit * 1.01])
    assert potential.conjugate(q).item() == math.inf
    assert potential.grad_conjugate(q)[1].item() == math.inf
    assert potential.grad_conjugate(q)[0].isfinite()
    assert potential.grad(torch.tensor([512.0])).item() <= potential.price_limit


@all_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_load_of_many_experts_is_finite(potential, dtype):
    mean = torch.zeros(4096, dtype=dtype)
    mean[7] = 1
    price = centred_price(potential, mean)
    assert price.isfinite().all() and potential.phi(4096 * mean).isfinite()
    assert price.argmax() == 7
    assert -MAX_DISCOUNT - 1e-3 <= potential.grad(torch.zeros(1)).item() < 0


@all_variants
def test_price_is_centred_and_monotone(potential):
    mean = loads(6, seed=6).reshape(2, 3, NUM_EXPERTS) / NUM_EXPERTS
    price = centred_price(potential, mean)
    assert price.shape == mean.shape
    torch.testing.assert_close(price.sum(-1), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(price.argsort(-1), mean.argsort(-1))
    raw = potential.grad(NUM_EXPERTS * mean)
    torch.testing.assert_close(price[..., 1:] - price[..., :-1], raw[..., 1:] - raw[..., :-1])
    slightly_off = torch.tensor([1.02, 0.98] * (NUM_EXPERTS // 2), dtype=torch.float64) / NUM_EXPERTS
    assert centred_price(potential, slightly_off).tolist() == pytest.approx([0.02, -0.02] * 4, rel=0.05)


def test_price_of_neg_entropy_by_hand():
    price = centred_price(get_potential("neg_entropy"), torch.tensor([0.5, 0.25, 0.25, 0.0]))
    raw = [math.log(2.0), 0.0, 0.0, math.log(1e-6)]
    assert price.tolist() == pytest.approx([x - sum(raw) / 4 for x in raw], rel=1e-6)


def test_price_is_a_constant_to_autograd_and_at_least_fp32():
    mean = torch.full((4,), 0.25, requires_grad=True)
    assert not centred_price(get_potential("l2"), mean).requires_grad
    for given, expected in [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]:
        r = torch.ones(4, dtype=getattr(torch, given))
        potential = get_potential("log_cosh")
        results = potential.phi(r), potential.grad(r), potential.conjugate(r / 2), potential.grad_conjugate(r / 2)
        assert {x.dtype for x in (*results, centred_price(potential, r / 4))} == {getattr(torch, expected)}


@all_variants
def test_fp32_agrees_with_fp64(potential):
    mean = loads(20, seed=7) / NUM_EXPERTS
    torch.testing.assert_close(
        centred_price(potential, mean.float()), centred_price(potential, mean).float(), rtol=1e-4, atol=1e-5
    )


def test_documented_coincidences():
    r = loads(10)
    for name, alpha in [("log_barrier", 0.0), ("hellinger", 0.5), ("neg_entropy", 1.0), ("l2", 2.0), ("l3", 3.0)]:
        torch.testing.assert_close(get_potential(name).grad(r), get_potential("tsallis", alpha=alpha).grad(r))
    wide = get_potential("log_cosh", delta=2.0)
    torch.testing.assert_close(get_potential("softplus").grad(r), wide.grad(r))


@all_variants
def test_copies_are_equal(potential):
    assert pickle.loads(pickle.dumps(potential)) == potential == copy.deepcopy(potential)
    assert potential != get_potential("tsallis", alpha=7.0)


@pytest.mark.parametrize(
    ("name", "kwargs", "mentions"),
    [
        ("shannon", {}, ["`potential`", "'shannon'", "'neg_entropy'", "'softplus'"]),
        (["l2"], {}, ["`potential`", "['l2']", "'neg_entropy'"]),
        ("tsallis", {"beta": 2.0}, ["`potential_kwargs`", "'beta'", "`alpha` in [0, 10]"]),
        ("neg_entropy", {"alpha": 2.0}, ["`potential_kwargs`", "'alpha'", "no parameter"]),
        ("l2", {"name": 2.0}, ["`potential_kwargs`", "'name'", "no parameter"]),
        ("tsallis", {"alpha": -0.1}, ["`potential_kwargs`", "alpha = -0.1", "[0, 10]", "1.1 if left out"]),
        ("lp", {"p": 1.0}, ["`potential_kwargs`", "p = 1.0", "[1.01, 10]"]),
        ("lp", {"p": math.inf}, ["p = inf"]),
        ("log_cosh", {"delta": math.nan}, ["delta = nan", "[0.01, 100]"]),
        ("softplus", {"delta": 0.0}, ["delta = 0.0"]),
        ("pseudo_huber", {"delta": "1"}, ["delta = '1'"]),
        ("pseudo_huber", {"delta": True}, ["delta = True"]),
    ],
)
def test_errors_name_field_value_and_remedy(name, kwargs, mentions):
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as error:
        get_potential(name, **kwargs)
    for mention in mentions:
        assert mention in str(error.value)
