"""`watch: true` in the three tools, with stand-ins for them; tests/integrations has the tools themselves."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from training import make_trainer, tiny_model, weights

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME
from hf_phibalance.watching import RECORDS_NAME, read_records


SHORT = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}


def stand_in(monkeypatch, name, **members):
    """Puts a module with `members` where the tool has it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(members)


def ours(monkeypatch, name):
    """Imports our module for a tool anew, for this test alone."""
    spec = importlib.util.find_spec(f"hf_phibalance.integrations.{name}")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def plain_run(folder):
    model = tiny_model("mixtral").train()
    make_trainer(model, folder, **SHORT).train()
    return model


def assert_watched(model, folder, plain, alone):
    """The run in `folder` was recorded, and is else as the plain one in `alone`."""
    records = read_records(folder)
    assert records.run["method"] == "none" and [row["step"] for row in records.rows] == [1, 2]
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(model).items())
    files = [{path.name for path in (run / "checkpoint-2").iterdir()} for run in (folder, alone)]
    assert files[0] == files[1] and STATE_NAME not in files[0]
    configs = [json.loads((run / "checkpoint-2" / "config.json").read_text()) for run in (folder, alone)]
    assert configs[0] == configs[1]


def start_llamafactory(monkeypatch, options):
    """Our command with a config of `options`. Returns the trained models."""
    llamafactory = ours(monkeypatch, "llamafactory")
    stand_in(monkeypatch, "llamafactory.hparams", read_args=lambda: options)
    models = []

    def run_exp(options):
        models.append(tiny_model("mixtral").train())
        make_trainer(models[-1], options["output_dir"], **SHORT).train()

    llamafactory.run(run_exp)
    return models


@pytest.fixture
def axolotl(monkeypatch):
    """The plugin's module, where Axolotl's base class does nothing."""
    pytest.importorskip("pydantic")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    return ours(monkeypatch, "axolotl")


class Options(dict):
    """Options by attribute, `None` if they are missing, as in Axolotl."""

    __getattr__ = dict.get

    def to_dict(self):
        return dict(self)


def checked(axolotl, **options):
    """What Axolotl's schema makes of the options, with ours in it."""
    from pydantic import ConfigDict

    extra = dict.fromkeys(
        ("overrides_of_model_config", "streaming", "pretraining_dataset", "sample_packing", "merge_lora")
    )

    class Schema(axolotl.PhiBalanceArgs):
        model_config = ConfigDict(extra="allow")

    dumped = Schema(**(extra | options)).model_dump(exclude_none=True)
    return Options({name: Options(value) if isinstance(value, dict) else value for name, value in dumped.items()})


@pytest.mark.slow
def test_llamafactory(tmp_path, monkeypatch):
    (plain,) = start_llamafactory(monkeypatch, {"watch": False, "output_dir": str(tmp_path / "alone")})
    assert not (tmp_path / "alone" / RECORDS_NAME).exists()
    (model,) = start_llamafactory(monkeypatch, {"watch": True, "output_dir": str(tmp_path / "watched")})
    assert_watched(model, tmp_path / "watched", plain, tmp_path / "alone")
    both = {"watch": True, "phi_balance": {"coef": 5.0}, "output_dir": str(tmp_path / "both")}
    (model,) = start_llamafactory(monkeypatch, both)
    assert read_records(tmp_path / "both").run["method"] == "phi" and phb.get_balancer(model).config.coef == 5.0


def test_llamafactory_refuses_what_would_not_be_watched(monkeypatch):
    for options, message in [
        ({"stage": "ppo"}, r"which watch does not reach. Remove watch\."),
        ({"use_ray": True}, r"Remove use_ray or watch\."),
        ({"packing": True}, r"phi_balance: {method: none, token_mask: labels}"),
    ]:
        with pytest.raises(ValueError, match=message):
            start_llamafactory(monkeypatch, options | {"watch": True})
    with pytest.raises(ValueError, match=r"`phi_balance` is missing: .* or `watch: true` to watch only"):
        start_llamafactory(monkeypatch, {})


@pytest.mark.slow
def test_axolotl(tmp_path, axolotl):
    plain, model = plain_run(tmp_path / "alone"), tiny_model("mixtral").train()
    cfg = checked(axolotl, watch=True, output_dir=str(tmp_path / "watched"), local_rank=0)
    plugin = axolotl.PhiBalancePlugin()
    plugin.post_model_load(cfg, model)
    trainer = make_trainer(model, tmp_path / "watched", **SHORT)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    plugin.post_train(cfg, model)
    assert_watched(model, tmp_path / "watched", plain, tmp_path / "alone")
    assert not (tmp_path / "watched" / STATE_NAME).exists()


def test_what_axolotl_is_told(axolotl):
    assert checked(axolotl, watch=True).phi_balance["method"] == "none"
    assert checked(axolotl, watch=True, phi_balance={"coef": 0.5}).phi_balance["coef"] == 0.5
    assert checked(axolotl, phi_balance=False).phi_balance is None
    for options, message in [
        ({}, "phi_balance is missing: .* or watch: true to watch only"),
        ({"watch": True, "context_parallel_size": 2}, "Remove context_parallel_size or watch"),
        (
            {"watch": True, "streaming": True, "sample_packing": True},
            "phi_balance: {method: none, token_mask: labels}",
        ),
        ({"phi_balance": True, "streaming": True, "sample_packing": True}, "phi_balance: {token_mask: labels}"),
    ]:
        with pytest.raises(ValueError, match=message):
            checked(axolotl, **options)


@pytest.mark.slow
def test_swift(tmp_path, monkeypatch):
    callbacks = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=callbacks)
    swift = ours(monkeypatch, "swift")
    plain, model = plain_run(tmp_path / "alone"), tiny_model("mixtral").train()
    swift.register(watch=True)
    trainer = make_trainer(model, tmp_path / "watched", **SHORT)
    trainer.template = SimpleNamespace(sequence_parallel_size=1)
    trainer.args.router_aux_loss_coef = 0.01  # the loss of the model stays on
    callback = callbacks["phi_balance"](trainer.args, trainer)
    trainer.add_callback(callback)
    trainer.callback_handler.on_init_end(trainer.args, trainer.state, trainer.control)
    trainer.train()
    assert_watched(model, tmp_path / "watched", plain, tmp_path / "alone")
    swift.register(watch=True, coef=0.5)
    assert callbacks["phi_balance"].args[0].coef == 0.5
