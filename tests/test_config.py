"""PhiBalanceConfig: accepted and refused values, and the round trip to JSON."""

import copy
import dataclasses
import json
import math
import pickle
import re

import pytest
from tiny import tiny_model

import hf_phibalance as phb
from hf_phibalance import PhiBalanceConfig
from hf_phibalance.config import CONFIG_NAME, package_version


OTHER = PhiBalanceConfig(
    coef=0.125,
    bias_coef=0.002,
    potential="tsallis",
    potential_kwargs={"alpha": 1.5},
    ema_rate=0.75,
    track="load",
    bias_track="probs",
    price_from="current",
    token_mask="labels",
    z_loss_coef=0.001,
    sequence_coef=0.0001,
    schedule="cosine",
    schedule_steps=7,
    fp32_routers=True,
)
NO_NUMBERS = [True, False, "0.1", None, [0.1], 1 + 0j, math.nan, math.inf, -math.inf]


def test_the_defaults_are_those_of_the_contract():
    config = PhiBalanceConfig()
    assert (config.coef, config.bias_coef, config.potential, config.potential_kwargs) == (0.01, 0.0, "neg_entropy", {})
    assert (config.track, config.bias_track, config.price_from) == ("probs", "load", "previous")
    assert config.token_mask == "attention" and 0 < config.ema_rate <= 1
    names = [f.name for f in dataclasses.fields(config) if f.name != "method"]
    assert all(getattr(OTHER, name) != getattr(config, name) for name in names)


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        *(
            ({name: value}, [f"`{name}`", repr(value), "[0, 100]", "published strengths"])
            for name in ("coef", "bias_coef", "z_loss_coef", "sequence_coef")
            for value in [-0.1, -1, 100.01, 10**40, 1e300, *NO_NUMBERS]
        ),
        *(
            ({"ema_rate": value}, ["`ema_rate`", repr(value), "[0.0001, 1]"])
            for value in [0, 0.0, -0.3, 9e-5, 1.01, 2, *NO_NUMBERS]
        ),
        ({"potential": "shannon"}, ["`potential`", "'shannon'", "'neg_entropy'", "'softplus'"]),
        ({"potential": None}, ["`potential`", "None", "'neg_entropy'"]),
        ({"potential": ["l2"]}, ["`potential`", "['l2']", "'neg_entropy'"]),
        ({"potential_kwargs": None}, ["`potential_kwargs`", "None", "{'alpha': 1.1}"]),
        ({"potential_kwargs": [("alpha", 1.1)]}, ["`potential_kwargs`", "('alpha', 1.1)", "dict"]),
        ({"potential_kwargs": {"alpha": 2.0}}, ["`potential_kwargs`", "'alpha'", "no parameter"]),
        ({"potential": "tsallis", "potential_kwargs": {"beta": 2.0}}, ["`potential_kwargs`", "'beta'", "`alpha`"]),
        ({"potential": "tsallis", "potential_kwargs": {"alpha": -1.0}}, ["alpha = -1.0", "[0, 10]"]),
        ({"potential": "tsallis", "potential_kwargs": {"alpha": math.nan}}, ["alpha = nan", "[0, 10]"]),
        ({"potential": "tsallis", "potential_kwargs": {1: 2.0}}, ["`potential_kwargs`", "1"]),
        *(
            ({name: value}, [f"`{name}`", repr(value), *map(repr, choices)])
            for name, choices in (
                ("track", ["probs", "load"]),
                ("bias_track", ["probs", "load"]),
                ("price_from", ["previous", "current", "global"]),
                ("token_mask", ["attention", "labels", "all"]),
                ("schedule", ["constant", "linear", "cosine", "off"]),
            )
            for value in ["Probs", "", None, True, ["probs"]]
        ),
        *(
            ({"schedule": "linear", "schedule_steps": value}, ["`schedule_steps`", repr(value), "'linear'"])
            for value in [0, -1, 1.5, True, "10", None]
        ),
        ({"schedule": "constant", "schedule_steps": 5}, ["`schedule_steps`", "5", "'constant'"]),
    ],
    ids=str,
)
def test_errors_name_field_value_and_remedy(fields, mentions):
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as error:
        PhiBalanceConfig(**fields)
    for mention in mentions:
        assert mention in str(error.value)
    with pytest.raises(ValueError, match=re.escape(mentions[0])):
        PhiBalanceConfig.from_dict(fields)
    with pytest.raises(ValueError, match=re.escape(mentions[0])):
        dataclasses.replace(OTHER, **{"potential_kwargs": {}, "potential": "neg_entropy"} | fields)


@pytest.mark.parametrize("value", [0, 1e-6, 3, 100])
@pytest.mark.parametrize("name", ["coef", "bias_coef", "z_loss_coef", "sequence_coef"])
def test_limits_are_accepted(name, value):
    assert getattr(PhiBalanceConfig(**{name: value}), name) == value
    assert {PhiBalanceConfig(ema_rate=rate).ema_rate for rate in (1, 1e-4)} == {1, 1e-4}


@pytest.mark.parametrize("potential", sorted(phb.POTENTIALS))
def test_every_potential_is_accepted(potential):
    config = PhiBalanceConfig(potential=potential)
    assert PhiBalanceConfig.from_dict(config.to_dict()) == config
    assert config.build_potential() == PhiBalanceConfig(potential=potential).build_potential()


def test_frozen_copied_and_compared():
    config = PhiBalanceConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.coef = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.coef
    assert PhiBalanceConfig() == config != OTHER
    assert copy.deepcopy(OTHER) == pickle.loads(pickle.dumps(OTHER)) == copy.copy(OTHER) == OTHER


def test_shares_no_dict_with_its_caller():
    given = {"alpha": 1.5}
    config = PhiBalanceConfig(potential="tsallis", potential_kwargs=given)
    given["alpha"] = -1.0
    config.to_dict()["potential_kwargs"]["alpha"] = -1.0
    assert config.potential_kwargs == {"alpha": 1.5}
    values = OTHER.to_dict()
    before = copy.deepcopy(values)
    read = PhiBalanceConfig.from_dict(values)
    assert values == before
    values["potential_kwargs"]["alpha"] = -1.0
    assert read == OTHER


@pytest.mark.parametrize(
    ("schedule", "steps", "shares"),
    [
        ("constant", 0, {0: 1, 10: 1, 10**6: 1}),
        ("linear", 10, {0: 1, 1: 0.9, 5: 0.5, 9: 0.1, 10: 0, 11: 0}),
        ("cosine", 10, {0: 1, 1: (1 + math.cos(0.1 * math.pi)) / 2, 5: 0.5, 10: 0, 10**6: 0}),
        ("off", 10, {0: 1, 9: 1, 10: 0, 11: 0}),
    ],
)
def test_coefficient_by_schedule(schedule, steps, shares):
    config = PhiBalanceConfig(coef=3.0, schedule=schedule, schedule_steps=steps)
    assert {step: config.coef_at(step) for step in shares} == pytest.approx({s: 3.0 * x for s, x in shares.items()})


def test_derived_properties():
    assert PhiBalanceConfig().is_on and PhiBalanceConfig(coef=0, bias_coef=0.1).is_on
    assert not PhiBalanceConfig(coef=0).is_on


# ---------------------------------------------------------------------- to JSON and back


@pytest.mark.parametrize("config", [PhiBalanceConfig(), OTHER], ids=["defaults", "other"])
def test_round_trips(config, tmp_path):
    values = config.to_dict()
    assert values.pop("version") == package_version()
    assert values == {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert PhiBalanceConfig.from_dict(config.to_dict()) == config
    assert PhiBalanceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = config.save(tmp_path / "made on" / "the way")
    assert path == tmp_path / "made on" / "the way" / CONFIG_NAME
    assert json.loads(path.read_text())["version"] == package_version()
    assert (
        PhiBalanceConfig.load(path) == PhiBalanceConfig.load(path.parent) == PhiBalanceConfig.load(str(path)) == config
    )
    OTHER.save(path.parent)
    assert PhiBalanceConfig.load(path) == OTHER


def test_missing_fields_take_their_defaults():
    assert PhiBalanceConfig.from_dict({}) == PhiBalanceConfig()
    assert PhiBalanceConfig.from_dict({"coef": 0.5, "version": "0.0.1"}) == PhiBalanceConfig(coef=0.5)


def test_from_any():
    assert PhiBalanceConfig.from_any(OTHER) is OTHER
    assert PhiBalanceConfig.from_any(OTHER.to_dict()) == OTHER
    assert PhiBalanceConfig.from_any({}) == PhiBalanceConfig.from_any(True) == PhiBalanceConfig()
    assert PhiBalanceConfig.from_any(False) is PhiBalanceConfig.from_any(None) is None
    for value in (0, 1, 0.5, "", "yes", [], [["coef", 1]], PhiBalanceConfig):
        with pytest.raises(ValueError, match=r"`here` must be a PhiBalanceConfig or a mapping.*false for no bal.*got"):
            PhiBalanceConfig.from_any(value, "`here`")
    with pytest.raises(ValueError, match="`here`: `coef` must lie in"):
        PhiBalanceConfig.from_any({"coef": []}, "`here`")


def from_the_future():
    return {**OTHER.to_dict(), "warmup": 100, "anneal": "cosine", "version": "99.0"}


def test_a_config_from_the_future(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps(from_the_future()))
    for read in (
        lambda: PhiBalanceConfig.from_dict(from_the_future()),
        lambda: PhiBalanceConfig.load(tmp_path),
        lambda: PhiBalanceConfig.from_any(from_the_future()),
    ):
        with pytest.raises(ValueError, match="'anneal', 'warmup'") as error:
            read()
        for mention in ("99.0", package_version(), "Upgrade hf_phibalance", "ema_rate"):
            assert mention in str(error.value)
    # known fields of a newer version are read
    assert PhiBalanceConfig.from_dict({**OTHER.to_dict(), "version": "99.0"}) == OTHER


def test_a_typing_error_in_a_dict():
    with pytest.raises(ValueError, match=r"'coeff'.*Known fields: coef, bias_coef") as error:
        PhiBalanceConfig.from_dict({"coeff": 0.1})
    assert "None" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"coef": 0.1', "not valid JSON"),
        ("coef: 0.1", "not valid JSON"),
        ("[1, 2]", "JSON object.*list"),
        ('{"coef": NaN}', "`coef`.*nan"),
        ('{"coef": "0.1"}', "`coef`.*'0.1'"),
        ('{"coef": true}', "`coef`.*True"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    with pytest.raises(OSError):
        PhiBalanceConfig.load(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(ValueError, match=message):
        PhiBalanceConfig.load(tmp_path)


# ---------------------------------------------------------------------- a bad configuration and a model


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad",
    [
        {"coef": -1.0},
        {"coef": math.nan},
        {"coef": True},
        {"bias_coef": math.inf},
        {"ema_rate": 0},
        {"potential": "shannon"},
        {"potential": "tsallis", "potential_kwargs": {"alpha": -1}},
        {"token_mask": "none"},
        from_the_future(),
        False,
        "neg_entropy",
        0.01,
    ],
    ids=str,
)
def test_a_bad_configuration_leaves_the_model_untouched(bad):
    model = tiny_model("mixtral", router_aux_loss_coef=0.02, output_router_logits=True)
    attributes, config = dict(vars(model)), model.config.to_dict()
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(ValueError, match="`config`"):
        phb.patch(model, bad)
    assert vars(model) == attributes and model.config.to_dict() == config
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    with pytest.raises(ValueError, match="not φ-balanced"):
        phb.get_balancer(model)


def test_a_misspelt_field_is_named():
    with pytest.raises(TypeError, match=r"no field 'coeff'\. Did you mean 'coef'"):
        PhiBalanceConfig(coeff=1)
