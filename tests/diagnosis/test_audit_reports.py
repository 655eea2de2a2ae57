"""
Public reports about the built-in loss, each rebuilt with a tiny model: the audit names the cause.

ms-swift, LLaMA-Factory and Megatron-LM are not installed here. Their causes are rebuilt in a `Trainer` of transformers.
"""

import gc

import pytest
from peft import get_peft_model
from stock_losses import COEF, AveragedOnceMore, CountsOfTheStep, CountsThatStartAnew, OnlyLogits, OwnLoss
from tiny import tiny_model
from training import make_trainer
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage():
    gc.freeze()
    yield
    gc.unfreeze()


def audited(model, folder, cls=Trainer, coef=None, **arguments):
    trainer = make_trainer(model.train(), folder, cls, **{"gradient_accumulation_steps": 1, **arguments})
    if coef is not None:
        trainer.args.router_aux_loss_coef = coef
    return phb.audit(trainer)


def on(model_type="mixtral", coef=COEF, **overrides):
    return tiny_model(model_type, output_router_logits=True, router_aux_loss_coef=coef, **overrides)


def assert_found(report, name, text, remedy="", ratio=None):
    found = next((check for check in report.checks if check.name == name), None)
    assert found is not None and text in found.finding and remedy in found.remedy, str(report)
    assert ratio is None or report.ratio == pytest.approx(ratio, rel=1e-3), str(report)


def test_trl_7222(tmp_path):
    """`router_aux_loss_coef` is silently ignored for models whose config has no output_router_logits."""
    report = audited(tiny_model("deepseek_v3"), tmp_path, OwnLoss, coef=0.001)
    assert report.sources == {"TrainingArguments.router_aux_loss_coef": 0.001}
    assert_found(report, "router logits", "DeepseekV3ForCausalLM returns no router logits", "phb.patch", ratio=0)
    assert report.exit_status() == 2


@pytest.mark.parametrize("coef", [0.001, 10.0])
def test_ms_swift_9127(coef, tmp_path):
    """Gemma 4: whatever router_aux_loss_coef is, the loss is the same."""
    report = audited(tiny_model("gemma4_text"), tmp_path, OwnLoss, coef=coef)
    assert_found(report, "router logits", "Gemma4ForCausalLM returns no router logits", ratio=0)


def test_ms_swift_5375(tmp_path):
    """The model's loss has the auxiliary loss in it already, and the trainer adds it once more."""
    report = audited(on(), tmp_path, OwnLoss, coef=COEF)
    assert_found(report, "two sources", "MixtralForCausalLM 0.01 in its loss, OwnLoss 0.01", ratio=2)
    report = audited(on(), tmp_path, OwnLoss, coef=COEF, gradient_accumulation_steps=4)
    assert_found(report, "two sources", "both add it", ratio=8)
    assert_found(report, "accumulation and ranks", "times 4")


def test_ms_swift_6787(tmp_path):
    """`global_aux_loss` does nothing more than `aux_loss`, because its counts begin anew with each micro-batch."""
    arguments = {"coef": COEF, "gradient_accumulation_steps": 4}
    report = audited(on(coef=0.0), tmp_path, CountsThatStartAnew, **arguments)
    assert_found(report, "counts", "from each micro-batch alone (about 15 positions each, the step has 60)", ratio=1)
    report = audited(on(coef=0.0), tmp_path, CountsOfTheStep, **arguments)
    assert_found(report, "counts", "from the whole step", ratio=1)


def test_llama_factory_8054(tmp_path):
    """Where does router_aux_loss_coef act in fine-tuning? Nowhere, until output_router_logits is on."""
    report = audited(tiny_model("qwen3_moe", router_aux_loss_coef=0.001), tmp_path)
    assert_found(
        report, "switched off", "output_router_logits=False in its config", "output_router_logits=True", ratio=0
    )
    assert_found(audited(on("qwen3_moe", 0.001), tmp_path), "declared", "config.router_aux_loss_coef=0.001", ratio=1)


def test_transformers_48911(tmp_path):
    """Models that balance by a bias never return their router logits, although they are asked to."""
    model = tiny_model("deepseek_v3")
    model.config.output_router_logits = True
    report = audited(model, tmp_path)
    assert_found(report, "router logits", "DeepseekV3ForCausalLM returns no router logits", "needs no router logits")
    assert report.status == "problem" and report.received == 0


def test_megatron_3769(tmp_path):
    """A loss with the counts of all parts is averaged over the parts once more. Here, the parts are micro-batches; `test_audit.py` has ranks."""
    report = audited(on(coef=0.0), tmp_path, AveragedOnceMore, coef=COEF, gradient_accumulation_steps=4)
    assert_found(report, "accumulation and ranks", "divided by 4", "correct the coefficient", ratio=0.25)
    assert_found(report, "counts", "from the whole step")


def test_trl_2197(tmp_path):
    """A trainer that computes its loss from the logits drops the auxiliary loss."""
    report = audited(on(), tmp_path, OnlyLogits)
    assert_found(report, "dropped", "OnlyLogits trains on a loss without it", ratio=0)


def test_label_smoothing(tmp_path):
    """It computes the loss of the trainer from the logits, too."""
    report = audited(on(), tmp_path, label_smoothing_factor=0.1)
    assert_found(report, "dropped", "Trainer trains on a loss without it", "compute_loss", ratio=0)


def test_ms_swift_5627(tmp_path):
    """GPT-OSS has 0.9 in its config, which SFTTrainer switches on by itself."""
    report = audited(tiny_model("gpt_oss", router_aux_loss_coef=0.9), tmp_path, SFTTrainer)
    assert_found(report, "size", "0.9 is large", ratio=1)
    assert_found(report, "default", "SFTTrainer switched the loss on by itself, with 0.9")


def test_a_config_that_is_changed_too_late(tmp_path):
    model = on()
    model.config.router_aux_loss_coef = 0.05
    assert_found(audited(model, tmp_path), "copied", "the model multiplies by 0.01", ratio=0.2)


def test_frozen_routers(tmp_path):
    """LoRA on attention: the loss arrives at the logits, but the routers do not learn."""
    model = on()
    model = get_peft_model(model, phb.lora_config(model, router="frozen", targets="attention"))
    assert_found(audited(model, tmp_path), "routers that learn", "all routers are frozen", "router='lora'", ratio=1)
