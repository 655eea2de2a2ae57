"""The methods of `PhiBalanceConfig`: published strengths, and the fields that each method reads."""

import copy
import dataclasses
import json

import pytest
from steps import METHODS

import hf_phibalance as phb
from hf_phibalance import PhiBalanceConfig


# the fields of φ that a method reads, and their defaults
READS = {
    "switch": {"coef": 0.01, "bias_coef": 0.0},
    "pooled": {"coef": 0.001},
    "global_batch": {"coef": 0.01, "bias_coef": 0.0},
    "loss_free": {"bias_coef": 0.001},
    "quantile": {"bias_coef": 1.0},
    "frozen": {},
    "none": {},
}
OTHERS = {
    "coef": [0.0, 0.5],
    "bias_coef": [0.0, 0.5],
    "potential": ["neg_entropy", "l2", "softplus"],
    "potential_kwargs": [{"delta": 2.0}],
    "ema_rate": [0.3, 0.77, 1.0],
    "track": ["probs", "load"],
    "bias_track": ["probs", "load"],
    "price_from": ["previous", "current", "global"],
}


def test_all_methods_are_listed():
    assert tuple(sorted(phb.METHODS)) == tuple(sorted(METHODS))
    assert PhiBalanceConfig().method == "phi" and set(READS) == set(METHODS) - {"phi"}


@pytest.mark.parametrize("method", READS)
def test_published_strengths_are_the_defaults(method):
    config = PhiBalanceConfig(method=method)
    for name in ("coef", "bias_coef"):
        assert getattr(config, name) == READS[method].get(name, 0.0)
        if name in READS[method]:
            assert getattr(PhiBalanceConfig(method=method, **{name: 0.25}), name) == 0.25


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("method", READS)
def test_a_field_that_the_method_does_not_read_is_refused(method, field):
    own = getattr(PhiBalanceConfig(method=method), field)
    assert getattr(PhiBalanceConfig(method=method, **{field: own}), field) == own
    others = [value for value in OTHERS[field] if value != own]
    assert others
    for value in others:
        if field in READS[method]:
            if (method, value) != ("quantile", 0.0):
                assert getattr(PhiBalanceConfig(method=method, **{field: value}), field) == value
            continue
        with pytest.raises(ValueError, match=f"`{field}`") as error:
            PhiBalanceConfig(method=method, **{field: value})
        assert field == "potential_kwargs" or (method in str(error.value) and repr(value) in str(error.value))


@pytest.mark.parametrize("value", ["Phi", "", None, True, ["phi"], "aux_free"])
def test_an_unknown_method_is_refused(value):
    with pytest.raises(ValueError, match="`method` must be one of") as error:
        PhiBalanceConfig(method=value)
    assert repr(value) in str(error.value) and all(repr(method) in str(error.value) for method in METHODS)


@pytest.mark.parametrize("value", [1.5, 0.0])
def test_quantile_moves_by_a_fraction(value):
    with pytest.raises(ValueError, match=r"`bias_coef`.*\(0, 1\]"):
        PhiBalanceConfig(method="quantile", bias_coef=value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_the_round_trip(method, tmp_path):
    strengths = dict.fromkeys(READS.get(method, {"coef", "bias_coef"}), 0.125)
    for config in (
        PhiBalanceConfig(method=method),
        PhiBalanceConfig(method=method, z_loss_coef=1e-3, sequence_coef=1e-4, token_mask="labels", **strengths),
    ):
        values = json.loads(json.dumps(config.to_dict()))
        assert values["method"] == method and None not in values.values()
        assert PhiBalanceConfig.from_dict(values) == config == copy.deepcopy(config)
        assert PhiBalanceConfig.load(config.save(tmp_path)) == config
        assert dataclasses.replace(config, z_loss_coef=0.5).z_loss_coef == 0.5
