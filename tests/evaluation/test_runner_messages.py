"""What a program's answers become on their way to the checks: their values, and nothing else."""

import collections
import decimal
import fractions
import json
import math

import pytest

from hf_phibalance.evaluation.runner.messages import Crossing


def cross(value):
    return Crossing().decode(json.loads(json.dumps(Crossing().encode(value))))


def test_values_cross_unchanged():
    values = [
        None, True, 0, -(1 << 63), 1 << 200, -0.0, 1e-308, math.inf, "ü\ud800\0", b"\0\xff", bytearray(b"x"), 1 + 2j,
        [], [1, [2.5, "x"]], (), (1, (2,)), {1, 2}, frozenset("ab"), {(1, 2): {"x": [None]}, 3: 4}, range(1, 9, 3),
        collections.deque([1, 2]), decimal.Decimal("1.10"), fractions.Fraction(1, 3),
    ]  # fmt: skip
    for value in values:
        again = cross(value)
        assert again == value and type(again) is type(value)
        # -0.0 == 0.0 and True == 1, so what is printed must agree too; a set prints its members in any order.
        assert isinstance(value, (set, frozenset)) or repr(again) == repr(value)
    assert math.isnan(cross(math.nan))
    for lazy in (iter([1, 2]), (x for x in [1, 2]), map(int, "12"), {1: 0, 2: 0}.keys(), {0: 1, 1: 2}.values()):
        assert list(cross(lazy)) == [1, 2]
    assert type(cross(collections.Counter("aab"))) is dict
    with pytest.raises(TypeError, match="type object"):
        cross([object()])
    with pytest.raises(TypeError, match="more than"):
        cross(iter(int, 1))


def test_the_same_object_stays_the_same():
    shared = [1]
    shared.append(shared)
    first, second = cross((shared, {"x": shared}))
    assert second["x"] is first and first[1] is first


@pytest.mark.parametrize(
    "forged", [{"same": 0}, {"eval": ["1"]}, {"list": 1}, {"set": [{"list": []}]}, {}, {"a": 1, "b": 2}]
)
def test_what_nobody_encoded_is_refused(forged):
    with pytest.raises((LookupError, TypeError, ValueError)):
        Crossing().decode(forged)
