"""The coefficient as it arrives over two real ranks, and problems that only one of them sees."""

import tempfile
from pathlib import Path

import pytest
import torch
from invariance import in_ranks
from layouts import save_models
from tiny import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import hf_phibalance as phb


pytestmark = pytest.mark.slow


def one_row(examples):
    return examples[0]


def on_each_rank():
    model = phb.patch(tiny_model("mixtral").train(), {"coef": 0.01})
    data = [tiny_batch(model, 2, 6 + i, seed=i) for i in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=1, gradient_accumulation_steps=2, report_to=[]
        )
        trainer = Trainer(model, arguments, data_collator=one_row, train_dataset=data)
        callback = phb.attach(trainer, verify=True)
        sound = phb.doctor(trainer)
        trainer.train()
        if torch.distributed.get_rank() == 1:
            gate = model.model.layers[1].mlp.gate
            gate.forward = torch.no_grad()(gate.forward)
        return sound, callback.report, phb.doctor(trainer)


class SumsOverRanks(Trainer):
    """Multiplies the averaged gradients by the number of ranks, on both alike."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for parameter in model.parameters():
            if parameter.grad is not None and self.accelerator.sync_gradients:
                parameter.grad *= 2
        return loss


def with_sums(folder):
    model = phb.patch(tiny_model("mixtral").train(), {"coef": 0.01})
    data = [tiny_batch(model, 2, 6 + i, seed=i) for i in range(8)]
    arguments = TrainingArguments(folder, use_cpu=True, per_device_train_batch_size=1, max_steps=2, report_to=[])
    trainer = SumsOverRanks(model, arguments, data_collator=one_row, train_dataset=data)
    callback = phb.attach(trainer, verify=True)
    try:
        trainer.train()
    except ValueError as error:
        return str(error), callback.report.coefficient.ratio


def spread(folder):
    from layouts import LAYOUTS, load_spread

    reports = {}
    for layout in LAYOUTS:
        if layout.name in ("FSDP2", "TP", "FSDP2, EP"):
            reports[layout.name] = phb.doctor(phb.patch(load_spread(layout, Path(folder, "mixtral")), {"coef": 0.01}))
    return reports


def test_models_that_transformers_spreads(tmp_path):
    save_models(tmp_path, ["mixtral"])
    for reports in in_ranks(spread, 2, str(tmp_path)):
        assert set(reports) == {"FSDP2", "TP", "FSDP2, EP"}
        for report in reports.values():
            assert report.status == "ok" and "weights of 2 routers" in report.coefficient.parameters, str(report)
            assert report.coefficient.ratio == pytest.approx(1, abs=1e-4)


def test_two_ranks():
    by_rank = in_ranks(on_each_rank, 2)
    for sound, trained, unsound in by_rank:
        for report in (sound, trained):
            found = report.coefficient
            assert report.status == "ok" and abs(found.ratio - 1) < 1e-4 and found.residual < 1e-4, str(report)
            assert "each of 2 ranks" in report.measured and "2 data-parallel ranks" in str(report)
        assert "2 micro-batches" in trained.measured and "weights of 3 routers" in trained.coefficient.parameters
        problem = next(check for check in unsound.problems if check.name == "routers that learn")
        assert problem.finding.startswith("rank 1: ")
    assert by_rank[0][0].coefficient.ratio == by_rank[1][0].coefficient.ratio
    assert by_rank[0][1] == by_rank[1][1]


def test_gradients_that_are_not_averaged(tmp_path):
    for message, ratio in in_ranks(with_sums, 2, str(tmp_path)):
        assert "ratio 2.0000" in message and abs(ratio - 2) < 1e-4
