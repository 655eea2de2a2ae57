"""The doctor names each problem where there is one. Sound set-ups: `test_healthy_setups`."""

import importlib.metadata
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_batch, tiny_model
from training import make_trainer
from transformers import Trainer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTTrainer

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME
from hf_phibalance.routers import find_routers


NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
SECOND = "model.layers.1.mlp.gate"


def build(model_type="mixtral", dtype=torch.float32, **config):
    return phb.patch(tiny_model(model_type, dtype=dtype).train(), {"coef": 0.01, **config})


def check(report, name):
    return next(check for check in report.checks if check.name == name)


def assert_found(report, name, status, *texts, remedy=""):
    found = check(report, name)
    assert found.status == status, str(report)
    for text in texts:
        assert text in found.finding, found.finding
    assert remedy in found.remedy, found.remedy


def test_a_sound_set_up_has_none():
    report = phb.doctor(build())
    assert report.status == "ok" and not report.problems and report.exit_status(strict=True) == 0
    assert {found.status for found in report.checks} == {"ok"} and not any(found.remedy for found in report.checks)


# ---------------------------------------------------------------------- a model that something was done to


def nothing(model):
    pass


def take_the_hook(model):
    hooks = model.get_submodule(SECOND)._forward_hooks
    hooks.pop(next(k for k, hook in hooks.items() if type(hook).__name__ == "RouterHook"))


def switch_on_its_loss(model):
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.02


def freeze_routers(model):
    for site in find_routers(model):
        model.get_submodule(site.name).requires_grad_(False)


def train_a_router(model):
    model.get_submodule(SECOND).requires_grad_(True)


def cut_the_gradient(model):
    gate = model.get_submodule(SECOND)
    gate.forward = torch.no_grad()(gate.forward)


def skip_a_block(model):
    model.model.layers[1].mlp.forward = lambda hidden: hidden


def quantise(model):
    bnb = pytest.importorskip("bitsandbytes")
    router = model.get_submodule(find_routers(model)[0].name)
    weight = router.layer.weight.detach()
    router.layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
    router.layer.weight = bnb.nn.Params4bit(weight, requires_grad=False).to("cpu")


def hide_labels(model):
    batch = tiny_batch(model)
    del batch["labels"]
    return batch


def mask_too_much(model):
    batch = tiny_batch(model, padded=False)
    batch["attention_mask"][:, :4] = 0
    return batch


def case(change, name, status, *texts, remedy="", **config):
    return pytest.param(change, config, name, status, texts, remedy, id=f"{change.__name__}, {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, config, name, status, texts, remedy",
    [
        case(take_the_hook, "patch", "problem", f"1 of 3 routers have no hook: {SECOND}", remedy="phb.unpatch"),
        case(take_the_hook, "routers that run", "problem", "1 of 3", SECOND),
        case(skip_a_block, "routers that run", "problem", "1 of 3", SECOND),
        case(switch_on_its_loss, "auxiliary loss", "problem", "router_aux_loss_coef=0.02", remedy="phb.patch(model)"),
        case(nothing, "auxiliary loss", "ok", "not measured", coef=0.0, bias_coef=0.1),
        case(nothing, "selection bias", "ok", "in the weights", model_type="deepseek_v3", bias_coef=0.1),
        case(freeze_routers, "routers that learn", "warning", "3 of 3", "only what lies below", remedy="lora_config"),
        case(cut_the_gradient, "routers that learn", "problem", "no gradient path", "1 of 3", SECOND),
        case(train_a_router, "routers that learn", "problem", "method='frozen'", SECOND, method="frozen", coef=0.0),
        case(nothing, "precision", "warning", "bfloat16", "0.39%", "choices are others", dtype=torch.bfloat16),
        case(quantise, "precision", "warning", "1 routers are quantised", remedy="skip_modules", model_type="dbrx"),
        case(hide_labels, "first step", "problem", "received no labels", token_mask="labels"),
        case(mask_too_much, "attention mask", "problem", "8 of 16", "16 have labels", "do not count"),
    ],
)
def test_found_in_a_model(change, config, name, status, texts, remedy):
    model = build(**config)
    batch = change(model)
    assert_found(phb.doctor(model, batch), name, status, *texts, remedy=remedy)


def test_not_patched():
    report = phb.doctor(tiny_model("mixtral"))
    assert_found(report, "patch", "problem", "not φ-balanced", remedy="phb.patch")
    assert report.coefficient is None and report.exit_status() == 2


def test_everything_frozen():
    model = build().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    report = phb.doctor(model)
    assert_found(report, "routers that learn", "problem", "all routers are frozen", remedy="lora_config")
    assert check(report, "coefficient").status == "problem"
    assert report.to_dict()["coefficient"]["ratio"] is None


def test_versions(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else real(name))
    assert_found(phb.doctor(build()), "versions", "problem", "transformers 4.57.1", remedy="pip install")


@pytest.mark.parametrize("reentrant", [True, False])
def test_kind_of_checkpointing(reentrant):
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = check(phb.doctor(model), "checkpointing")
    assert found.status == "ok" and found.finding.startswith("reentrant" if reentrant else "non-reentrant")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, status, text",
    [
        ("sound", "ok", f"{STATE_NAME} fits, after 0 steps"),
        ("damaged", "problem", "damaged"),
        ("foreign", "problem", "another model"),
        ("missing", "warning", "start anew"),
    ],
)
def test_state_file(tmp_path, kind, status, text):
    build().save_pretrained(tmp_path / "model")
    state = tmp_path / "model" / STATE_NAME
    if kind == "damaged":
        content = bytearray(state.read_bytes())
        content[-3] ^= 1
        state.write_bytes(content)
    elif kind == "foreign":
        build("qwen3_moe").save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / STATE_NAME, state)
    elif kind == "missing":
        state.unlink()
    model = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "model", phi_balance=False)
    before = phb.get_balancer(phb.patch(model)).state_dict()
    assert_found(phb.doctor(model), "state file", status, text)
    assert all(torch.equal(value, before[name]) for name, value in phb.get_balancer(model).state_dict().items())


def test_a_selection_bias_that_a_plain_load_loses():
    """The share of changed choices is that of the routers' own logits without the bias."""
    model = build(bias_coef=0.1)
    balancer = phb.get_balancer(model)
    balancer.set_biases({site.name: torch.eye(site.num_experts)[0] for site in balancer.sites})  # all go to expert 0
    batch = tiny_batch(model)
    report = phb.doctor(model, batch)
    assert_found(report, "selection bias", "warning", "3 routers", remedy="phi_balance=True")

    pairs, counted = [], batch["attention_mask"].reshape(-1).bool()
    for site in find_routers(model):
        gate = model.get_submodule(site.name)
        gate.register_forward_hook(
            lambda _, args, out: pairs.extend(zip(out[2][counted], out[0].topk(2).indices[counted]))
        )
    with torch.no_grad():
        model(**batch)
    lost = sum(len(set(ours.tolist()) - set(plain.tolist())) for ours, plain in pairs) / (2 * len(pairs))
    assert lost > 0.05 and f"would change {lost:.1%} of the choices" in check(report, "selection bias").finding


def test_choices_that_rounding_changes():
    """The share is that of the top-k of rounded logits against that of exact ones."""
    overrides = {"num_hidden_layers": 1, "num_local_experts": 64}
    model = phb.patch(tiny_model("mixtral", dtype=torch.bfloat16, **overrides).train(), {"coef": 0.01})
    gate, seen = model.model.layers[0].mlp.gate, {}
    gate.register_forward_hook(lambda _, args, output: seen.update(hidden=args[0], logits=output[0]))
    batch = tiny_batch(model, 4, 64, padded=False)
    with torch.no_grad():
        model.eval()(**batch)
    exact = (seen["hidden"].reshape(-1, 32).float() @ gate.weight.float().T).topk(2).indices
    rounded = seen["logits"].float().topk(2).indices
    share = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(rounded, exact)) / exact.numel()
    assert share > 0
    assert f"{share:.2%} of the choices" in check(phb.doctor(model.train(), batch), "precision").finding


def test_padding_without_a_mask():
    model = build()
    batch = tiny_batch(model, 4, 12)
    padding = int((batch.pop("attention_mask") == 0).sum())
    runs = int((batch["input_ids"] == 0).sum(1)[(batch["input_ids"] == 0).sum(1) > 1].sum())
    assert padding > 2 and runs > 2
    report = phb.doctor(model, batch)
    assert_found(report, "attention mask", "problem", f"{runs} of padding", "no attention_mask", remedy="labels")
    assert check(phb.doctor(build(token_mask="labels"), batch), "attention mask").status == "ok"
    assert check(phb.doctor(build(token_mask="all"), batch), "attention mask").status == "warning"


def test_even_probabilities_with_collapsed_loads():
    """With small router weights all probabilities are alike, and yet every token goes to the same two experts."""
    model = build()
    for site in find_routers(model):
        weight = model.get_submodule(site.name).weight.detach()
        weight.mul_(1e-3)
        model.get_submodule(site.name).register_forward_pre_hook(lambda _, args: (args[0].abs(),))
        weight[:2].abs_()
        weight[2:].abs_().neg_()
    batch = tiny_batch(model, 4, 32)
    report = phb.doctor(model, batch)
    assert_found(report, "loads", "warning", "of 3 routers are even", "2.0 of 8 experts", remedy="track='load'")
    for config in ({"coef": 0.01, "track": "load"}, {"coef": 0.01, "bias_coef": 0.1}):
        assert "loads" not in {found.name for found in phb.doctor(phb.patch(model, config), batch).checks}


# ---------------------------------------------------------------------- a trainer


def test_another_auxiliary_loss_of_the_trainer(tmp_path):
    """Switched on after `attach`, which switches off the one that it finds."""
    trainer = make_trainer(build(), tmp_path, SFTTrainer)
    assert_found(phb.doctor(trainer), "trainer", "ok", "which train() does")
    phb.attach(trainer)
    assert_found(phb.doctor(trainer), "auxiliary loss", "ok")
    assert_found(phb.doctor(trainer), "trainer", "ok", "SFTTrainer: attached")
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.03
    report = phb.doctor(trainer)
    assert_found(report, "auxiliary loss", "problem", "SFTTrainer", "0.03", remedy="router_aux_loss_coef=0.0")


class AddsLoss(Trainer):
    """Adds transformers' auxiliary loss itself."""

    def compute_loss(self, model, inputs, **kwargs):
        outputs = model(**inputs, output_router_logits=True)
        return outputs.loss + self.strength * load_balancing_loss_func(outputs.router_logits, 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, NON_REENTRANT], ids=["fp32", "bf16", "checkpointing"])
@pytest.mark.parametrize("strength", [0.02, 0.0])
def test_another_auxiliary_loss_in_compute_loss(tmp_path, arguments, strength):
    trainer = make_trainer(build(), tmp_path, AddsLoss, max_steps=2, **arguments)
    trainer.strength = strength
    callback = phb.attach(trainer, verify=True)
    assert_found(phb.doctor(trainer), "auxiliary loss", "ok", "compute_loss was not run", "verify=True")
    trainer.train()
    if strength:
        found = check(callback.report, "auxiliary loss")
        assert_found(callback.report, "auxiliary loss", "warning", "logits of 3 routers", "times that of the prices")
        assert float(re.search(r"up to (\S+) times", found.finding)[1]) > 1
    else:
        assert check(callback.report, "auxiliary loss").finding == "none beside φ-balancing"
    assert check(callback.report, "coefficient").status == "ok"


class Contrasts(Trainer):
    """The losses of its micro-batches cancel, so that 16 bits hold little of the sum."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.sign = -getattr(self, "sign", -1)
        return super().training_step(model, self.train_dataset.first, *args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        return self.sign * super().compute_loss(*args, **kwargs)


@pytest.mark.slow
def test_rounding_is_not_measured(tmp_path):
    model = build(dtype=torch.bfloat16)
    trainer = make_trainer(model, tmp_path, Contrasts, max_steps=2, gradient_accumulation_steps=2)
    trainer.train_dataset.first = tiny_batch(model, 2, 9)
    callback = phb.attach(trainer, verify=True)
    trainer.train()
    assert_found(callback.report, "coefficient", "ok", "the logits of 3", "lost in rounding")


def test_parallelism_without_process_group(tmp_path):
    trainer = make_trainer(build(), tmp_path)
    trainer.accelerator.state.parallelism_config = SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)
    try:
        report = phb.doctor(trainer)
    finally:
        trainer.accelerator.state.parallelism_config = None
    assert_found(report, "parallelism", "problem", "cp_size=2")
    assert_found(report, "coefficient", "warning", "not measured")


def test_an_engine_that_does_not_get_the_bias(tmp_path):
    trainer = make_trainer(build(bias_coef=0.1), tmp_path)
    trainer.args.use_vllm = True
    assert_found(phb.doctor(trainer), "selection bias", "warning", "vLLM generates with", remedy="bias_coef=0")


def test_sharded_training_is_not_tried_out(tmp_path):
    """DeepSpeed and FSDP shard gradients: nothing is run, and a warning says so."""
    trainer = make_trainer(build(), tmp_path)
    trainer.is_deepspeed_enabled = True
    report = phb.doctor(trainer)
    assert_found(report, "coefficient", "warning", "sharded", remedy="verify=True")
    assert report.measured == "nothing was run" and check(report, "routers that learn").status == "ok"


def test_data_that_cannot_be_collated(tmp_path):
    def fails(examples):
        raise KeyError("labels")

    trainer = make_trainer(build(), tmp_path)
    trainer.data_collator = fails
    report = phb.doctor(trainer)
    assert_found(report, "first step", "problem", "the first batch could not be made: KeyError: 'labels'")
    assert "made tokens" in report.measured
