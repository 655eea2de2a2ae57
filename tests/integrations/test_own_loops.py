"""The loops of recipes/guides/LOOPS.md, as they stand but for names and strengths: the optimizer gets the coefficient, checkpoints the duals."""

import re

import pytest
import torch
from invariance import COEF, LONGEST, Recorder, build_model, build_rows, collate, deal, reference
from paths import ROOT
from torch.utils.data import DataLoader

import hf_phibalance as phb


pytestmark = pytest.mark.slow


PAGE = (ROOT / "recipes/guides/LOOPS.md").read_text()


def block(heading):
    """The first block of Python under a heading of the page, with the strength of the definition."""
    code = re.search(rf"## {heading}\n.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert code.count('{"coef": 0.01}') == 1
    return code.replace('{"coef": 0.01}', repr({"coef": COEF}))


class ClosureRecorder(Recorder):
    """Forward and backward are called by the optimizer, as Lightning has it."""

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step()
        return loss


def prepared():
    """A model with prices in force, an optimizer that notes what it gets, and the definition."""
    model, expected = build_model("mixtral"), reference("mixtral")
    phb.patch(model, {"coef": COEF})
    phb.get_balancer(model).load_state_dict(expected.duals)
    return model, ClosureRecorder(model), COEF * expected.phi


def added(run):
    """What balancing adds to the gradient of the optimizer step that `run(model, optimizer)` carries out."""
    model, optimizer, declared = prepared()
    run(model, optimizer)
    with_prices = optimizer.gradient
    model, optimizer, _ = prepared()
    phb.get_balancer(model).load_state_dict(
        {
            name: torch.full_like(value, 1 / value.numel()) if value.ndim else value
            for name, value in reference("mixtral").duals.items()
        }
    )  # even means: all prices are the same, so that they add nothing
    run(model, optimizer)
    return with_prices - optimizer.gradient, declared


def assert_declared(run):
    gradient, declared = added(run)
    assert float((gradient - declared).norm() / declared.norm()) < 1e-4


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_plain_pytorch(micro_batches, capsys):
    code = block("Plain PyTorch")
    rows = build_rows()

    def run(model, optimizer):
        loader = DataLoader(rows, batch_sampler=deal(micro_batches), collate_fn=collate)  # of unequal sizes
        exec(code, {"model": model, "optimizer": optimizer, "steps": [list(loader)]})

    assert_declared(run)
    assert "max_vio" in capsys.readouterr().out


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_accelerate(micro_batches, tmp_path):
    code = block("accelerate")
    rows = build_rows()

    def run(model, optimizer):
        loader = DataLoader(rows, batch_sampler=deal(micro_batches), collate_fn=collate)  # of unequal sizes
        names = {"model": model, "optimizer": optimizer, "loader": loader}
        exec(code, names)
        names["accelerator"].save_state(tmp_path)
        after = phb.get_balancer(model).state_dict()
        assert after["steps"] == 2
        phb.get_balancer(model).load_state_dict(reference("mixtral").duals)
        names["accelerator"].load_state(tmp_path)
        assert all(torch.equal(value, after[name]) for name, value in phb.get_balancer(model).state_dict().items())

    assert_declared(run)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    code = block("Lightning")
    rows = build_rows()

    def run(model, optimizer):
        names = {}
        exec(code, names)
        module = names["Balanced"](model)
        module.configure_optimizers = lambda: optimizer
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **settings)
        trainer.fit(module, DataLoader(rows, batch_size=len(rows), collate_fn=lambda rows: collate(rows, LONGEST)))
        after = phb.get_balancer(model).state_dict()
        assert after["steps"] == 2
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        phb.get_balancer(model).load_state_dict(reference("mixtral").duals)
        module.on_load_checkpoint(torch.load(tmp_path / "last.ckpt"))
        assert all(torch.equal(value, after[name]) for name, value in phb.get_balancer(model).state_dict().items())

    assert_declared(run)
