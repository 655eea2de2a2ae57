"""The coefficient as it arrives over two real ranks, and problems that only one of them sees."""

import tempfile

import torch
from invariance import in_ranks
from tiny import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import hf_phibalance as phb


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
        phb.attach(trainer)
        sound = phb.doctor(trainer)
        if torch.distributed.get_rank() == 1:
            gate = model.model.layers[1].mlp.gate
            gate.forward = torch.no_grad()(gate.forward)
        return sound, phb.doctor(trainer)


def test_two_ranks():
    by_rank = in_ranks(on_each_rank, 2)
    for sound, unsound in by_rank:
        found = sound.coefficient
        assert sound.status == "ok" and abs(found.ratio - 1) < 1e-4 and found.residual < 1e-4, str(sound)
        assert "each of 2 ranks" in sound.measured and "2 data-parallel ranks" in str(sound)
        problem = next(check for check in unsound.problems if check.name == "routers that learn")
        assert problem.finding.startswith("rank 1: ")
    assert by_rank[0][0].coefficient.ratio == by_rank[1][0].coefficient.ratio
