"""Each potential against its textbook form, autograd, and the definition of convexity."""

import copy
import math
import pickle
import re

import pytest
import torch

from hf_phibalance.maths import POTENTIALS, centred_price, get_potential
from hf_phibalance.maths.potentials import MAX_DISCOUNT


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
    """Random relative loads `(num_points, NUM_EXPERTS)` in fp64. Every row sums to the number of experts."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_points, NUM_EXPERTS, generator=generator, dtype=torch.float64).log().neg()
    weights = weights**concentration
    return NUM_EXPERTS * weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", POTENTIALS)
def test_phi_is_the_textbook_potential(name):
    assert set(TEXTBOOK) == set(POTENTIALS)
    assert {variant.family for variant in POTENTIALS.values()} == {"entropy", "norm", "robust"}
    variant = POTENTIALS[name]
    values = [variant.default, 0.7 * variant.default + 0.7] if variant.parameter else [None]
    for value in values:
        kwargs = {} if value is None else {variant.parameter: value}
        r = loads(5).clamp(min=0.02)
        r = NUM_EXPERTS * r / r.sum(-1, keepdim=True)
        expected = [
            sum(TEXTBOOK[name](x, **kwargs) - TEXTBOOK[name](1.0, **kwargs) for x in row) for row in r.tolist()
        ]
        assert get_potential(name, **kwargs).phi(r).tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@all_variants
def test_gradient_and_units(potential):
    """`grad` is the gradient of `phi`, also below the floor. At balance φ is 0, its gradient 0 and its curvature 1."""
    r = loads(20, concentration=2.0)
    r[0, 0], r[1, 1] = 0.0, potential.floor / 2  # a dead expert, and one on the tangent
    r.requires_grad_()
    (expected,) = torch.autograd.grad(potential.phi(r).sum(), r)
    torch.testing.assert_close(potential.grad(r), expected, rtol=1e-9, atol=1e-10)
    one = torch.ones(NUM_EXPERTS, dtype=torch.float64, requires_grad=True)
    slope = potential.grad(one)
    (curvature,) = torch.autograd.grad(slope.sum(), one)
    assert potential.phi(one).item() == pytest.approx(0.0, abs=1e-12)
    assert slope.tolist() == pytest.approx([0.0] * NUM_EXPERTS, abs=1e-12)
    assert curvature.tolist() == pytest.approx([1.0] * NUM_EXPERTS)


@all_variants
def test_strictly_convex_with_its_minimum_at_uniform(potential):
    a, b = loads(200, seed=1), loads(200, seed=2)
    assert (potential.phi((a + b) / 2) < (potential.phi(a) + potential.phi(b)) / 2).all()
    r = torch.linspace(potential.floor + 1e-3, NUM_EXPERTS, 400, dtype=torch.float64, requires_grad=True)
    (curvature,) = torch.autograd.grad(potential.grad(r).sum(), r)
    assert (curvature > 0).all()
    near, far = 1 + 1e-3 * (loads(100) - 1), loads(100, concentration=3.0)
    at_uniform = potential.phi(torch.ones(NUM_EXPERTS, dtype=torch.float64))
    assert (potential.phi(near) > at_uniform).all()
    assert (potential.phi(far) > at_uniform + 0.1).all()


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
    torch.testing.assert_close(price.sum(-1), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(price.argsort(-1), mean.argsort(-1))
    raw = potential.grad(NUM_EXPERTS * mean)
    torch.testing.assert_close(price[..., 1:] - price[..., :-1], raw[..., 1:] - raw[..., :-1])
    slightly_off = torch.tensor([1.02, 0.98] * (NUM_EXPERTS // 2), dtype=torch.float64) / NUM_EXPERTS
    assert centred_price(potential, slightly_off).tolist() == pytest.approx([0.02, -0.02] * 4, rel=0.05)
    torch.testing.assert_close(centred_price(potential, mean.float()), price.float(), rtol=1e-4, atol=1e-5)


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
        results = potential.phi(r), potential.grad(r), centred_price(potential, r / 4)
        assert {x.dtype for x in results} == {getattr(torch, expected)}


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
