"""`doctor` and `attach(verify=True)` find nothing in sound set-ups. Problems: `test_doctor_problems`; ranks: `test_measured_on_two_ranks`."""

import pytest
import torch
import torch.nn.functional as F
from adapters import fill
from peft import get_peft_model
from tiny import tiny_model
from training import make_trainer, rows
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


LONG = rows(4, shortest=760, longest=800)
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
WHOLE = {"router": "full", "targets": "attention"}


def upcycled(stretch=1.0, **overrides):
    """Returns a model with eight equal experts and new routers, which get no gradient from the task."""
    model = tiny_model("mixtral", max_position_embeddings=1024, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(stretch * parameter[:1].expand_as(parameter))
            elif name.endswith("gate.weight"):
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return model


class Extra(Trainer):
    """Adds a loss on the model's output, not on its routers."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        entropy = -(F.softmax(outputs.logits, -1) * F.log_softmax(outputs.logits, -1)).sum(-1).mean()
        loss = loss + 0.1 * entropy
        return (loss, outputs) if return_outputs else loss


class Halves(Trainer):
    """Trains on one half of a batch after the other, in one micro-batch."""

    def compute_loss(self, model, inputs, **kwargs):
        parts = ({name: value[half] for name, value in inputs.items()} for half in (slice(0, 1), slice(1, 2)))
        return sum(super(Halves, self).compute_loss(model, part, **kwargs) for part in parts) / 2


def make(model="mixtral", cls=Trainer, adapter=None, config=None, fields=None, **arguments):
    """Returns the parts of a set-up, for `test_nothing_is_found`."""
    return model, cls, adapter, config or {}, fields or {}, arguments


SETUPS = {
    **{
        family: make(family)
        for family in ("qwen3_moe", "olmoe", "phimoe", "gpt_oss", "llama4_text", "dbrx", "granitemoe")
    },
    "family with a bias of its own": make("deepseek_v3", config={"bias_coef": 0.01}),
    "shared experts among the logits": make("inkling_text"),
    "without accumulation": make(gradient_accumulation_steps=1),
    "accumulation with a remainder": make(gradient_accumulation_steps=4),
    "bf16 autocast": make(bf16=True),
    "routers in fp32": make(fields={"dtype": torch.bfloat16}, config={"fp32_routers": True}),
    "reentrant checkpointing": make(**REENTRANT),
    "non-reentrant checkpointing": make(**NON_REENTRANT),
    "TRL, checkpointing as it comes": make(cls=SFTTrainer),
    "LoRA on routers": make(cls=SFTTrainer, adapter={"router": "lora"}),
    "LoRA, whole routers": make(cls=SFTTrainer, adapter=WHOLE),
    "DoRA": make(adapter={**WHOLE, "use_dora": True}),
    "rsLoRA, dropout": make(adapter={**WHOLE, "use_rslora": True, "lora_dropout": 0.3}),
    "frozen routers": make(adapter={"targets": "attention"}, config={"method": "frozen", "coef": 0.0}),
    "packing": make(cls=SFTTrainer, packing=True, packing_strategy="wrapped", max_length=16),
    "clipped gradients": make(max_grad_norm=1e-4),
    "weight decay": make(optim="adamw_torch", weight_decay=0.1),
    "torch.compile": make(torch_compile=True, torch_compile_backend="aot_eager"),
    "label smoothing": make(label_smoothing_factor=0.1),
    "NEFTune, dropout": make(neftune_noise_alpha=5.0, fields={"attention_dropout": 0.3}),
    "an extra loss term": make(cls=Extra),
    "two forwards of a micro-batch": make(cls=Halves),
    "two forwards, reentrant checkpointing": make(cls=Halves, **REENTRANT),
    "only labelled tokens": make(config={"token_mask": "labels"}),
    "z-loss": make(config={"z_loss_coef": 0.01}),
    "sequence-wise loss": make(config={"sequence_coef": 0.01}),
    "method switch": make(config={"method": "switch"}),
    "method pooled": make("qwen3_moe", config={"method": "pooled"}),
    "prices of the whole step": make("deepseek_v3", config={"price_from": "global", "bias_coef": 0.1}),
    "prices by load, warm-up": make(config={"track": "load", "schedule": "linear", "schedule_steps": 100}),
    "upcycled": make(upcycled, SFTTrainer, max_length=1024, data=LONG),
    "upcycled, bf16": make(upcycled, SFTTrainer, max_length=1024, data=LONG, bf16=True),
    "upcycled, whole routers": make(upcycled, SFTTrainer, WHOLE, max_length=1024, data=LONG),
    "upcycled, whole routers, bf16": make(upcycled, SFTTrainer, WHOLE, max_length=1024, data=LONG, bf16=True),
}


@pytest.mark.parametrize("name", SETUPS)
def test_nothing_is_found(name, tmp_path, warned):
    build, cls, adapter, config, fields, arguments = SETUPS[name]
    model = (build(**fields) if callable(build) else tiny_model(build, **fields)).train()
    if adapter is not None:
        model = get_peft_model(model, phb.lora_config(model, **adapter))
        fill(model, "lora_B", 0.1)
    model = phb.patch(model, {"coef": 0.01, **config})
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 2, **arguments}
    trainer = make_trainer(model, tmp_path, cls, **arguments)
    callback = phb.attach(trainer, verify=True)
    before = phb.doctor(trainer)
    trainer.train()
    for report in (before, callback.report):
        assert report.status == "ok", str(report)
        if model.config.phi_balance["coef"]:
            found = report.coefficient
            for ratio in (found.ratio, *found.by_router.values()):
                assert ratio == pytest.approx(1, abs=1e-3 if found.precise else 5e-3)
            kinds = {None: "none", True: "reentrant", False: "non-reentrant"}
            if "gradient_checkpointing_kwargs" in arguments:
                kind = kinds[arguments["gradient_checkpointing_kwargs"]["use_reentrant"]]
                assert next(c for c in report.checks if c.name == "checkpointing").finding == kind
    said = [line for line in warned.lines if "Balancing gradient" not in line]  # what an adapter leaves to learn
    assert not [line for line in said if "balanc" in line or "router" in line], said
