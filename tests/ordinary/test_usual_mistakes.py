"""Usual mistakes that no other file tests: each raises or warns, with a remedy. See recipes/guides/MISTAKES.md."""

import gc
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from measuring import Watch, assert_declared, batches, logits, ordinary, priced, take_steps
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from training import make_trainer, rows, tokenizer
from trl import DPOConfig, DPOTrainer

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


DATA = batches(4)
STEPS = 9  # warnings about missing calls come after 8 steps


def patched(**config):
    return phb.patch(ordinary().train(), {"coef": 0.1, **config})


@pytest.fixture
def model():
    return patched()


# ---------------------------------------------------------------------- wrong models, batches and options


@pytest.mark.parametrize("call", [phb.patch, phb.unpatch, phb.get_balancer, phb.doctor, phb.lora_config])
def test_a_name_or_a_trainer_in_place_of_a_model(call, model, tmp_path):
    for wrong in ("mistralai/Mixtral-8x7B-v0.1", *([] if call is phb.doctor else [make_trainer(model, tmp_path)])):
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got .*from_pretrained.*its `model`"):
            call(wrong)


def test_a_model_in_place_of_a_folder(model, tmp_path):
    with pytest.raises(TypeError, match=r"`source` must be the folder .* got a MixtralForCausalLM. Save it first"):
        phb.export(model, tmp_path)


def test_a_model_in_place_of_a_trainer(model):
    with pytest.raises(TypeError, match=r"`trainer` must be a transformers.Trainer, got a MixtralForCausalLM"):
        phb.attach(model)


def test_an_unpatched_model_is_saved_as_ever(model, tmp_path):
    phb.unpatch(take_steps(model)).save_pretrained(tmp_path)
    assert not (tmp_path / STATE_NAME).exists()
    assert "phi_balance" not in (tmp_path / "config.json").read_text()


def test_a_batch_in_place_of_several(model):
    with pytest.raises(ValueError, match=r"`batches` must be batches as the model gets them.*pass \[batch\]"):
        phb.calibrate(model, DATA[0])


@pytest.mark.parametrize(
    "wrong",
    ["4", True, 2.0, None, DataLoader([{}], batch_size=None), {"input_ids": torch.zeros(1, 2)}, iter([{}])],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_begin_step_does_not_take(wrong, model):
    with pytest.raises(
        ValueError, match=r"`micro_batches` must be a list of batches or their number, got a .*(list|\[batch\])"
    ):
        phb.get_balancer(model).begin_step(wrong)


def test_a_step_without_micro_batches(model):
    for nothing in (0, []):
        with pytest.raises(ValueError, match="`micro_batches` must hold at least one micro-batch, got"):
            phb.get_balancer(model).begin_step(nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "yes"}, "`verify` must be True or False, got 'yes'"),
        ({"fresh_duals": 1}, "`fresh_duals` must be True or False, got 1"),
        ({"per_layer": "all"}, "`per_layer` must be a number of layers, 0 for none, got 'all'"),
        ({"per_layer": True}, "`per_layer` must be a number of layers, 0 for none, got True"),
        ({"process_group": "gloo"}, "`process_group` must be a torch.distributed.ProcessGroup, got 'gloo'"),
    ],
    ids=str,
)
def test_options_of_attach(options, message, model, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        phb.attach(make_trainer(model, tmp_path), **options)


@pytest.mark.slow
def test_options_that_come_too_late(model, tmp_path):
    """`verify` may be set later. Options that decide how the trainer is wired need `detach()` first."""
    trainer = make_trainer(model, tmp_path, max_steps=1)
    callback = phb.attach(trainer)
    assert phb.attach(trainer, verify=True) is callback
    with pytest.raises(ValueError, match="`calibrate` and `process_group` are for the first attach"):
        phb.attach(trainer, calibrate=1)
    callback.detach()
    phb.attach(trainer, calibrate=1)
    trainer.train()


def test_a_balancer_whose_configuration_is_set(model):
    with pytest.raises(AttributeError, match=r"is not set: phb\.patch\(model, config\) changes it"):
        phb.get_balancer(model).config = phb.PhiBalanceConfig(coef=0.5)


@pytest.mark.slow
def test_a_balancer_whose_model_is_gone():
    balancer = phb.get_balancer(patched())
    gc.collect()
    with pytest.raises(RuntimeError, match=r"is gone. Keep a variable that holds it"):
        balancer.learning_report()


# ---------------------------------------------------------------------- models that cannot be balanced


def switch_transformer():
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = transformers.SwitchTransformersConfig(**sizes, num_experts=4, vocab_size=32)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def uneven():
    """Returns a Mixtral whose first layer has fewer experts."""
    model = tiny_model("mixtral")
    block = model.model.layers[0].mlp
    for owner, name in ((block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj")):
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach()[:5].clone()))
    block.gate.num_experts = block.experts.num_experts = 5
    return model


def two_models():
    return nn.ModuleDict({"one": ordinary(), "other": ordinary()})


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (switch_transformer, {}, "SwitchTransformersForConditionalGeneration has no router"),
        (two_models, {}, "ModuleDict holds 2 models with routers.*Patch the one that is trained"),
        (uneven, {"method": "pooled"}, "have different numbers of experts. Use method='switch'"),
        (
            lambda: tiny_model("gemma4_text"),
            {"z_loss_coef": 0.1},
            "z_loss_coef=0.1 is not possible for .*it returns probabilities.*Set z_loss_coef=0",
        ),
    ],
    ids=["encoder-decoder", "two models", "pooled", "z-loss"],
)
def test_what_cannot_be_patched(build, config, message):
    with pytest.raises(ValueError, match=message):
        phb.patch(build(), config)


def test_which_of_two_balancers():
    both = two_models()
    for one in both.values():
        phb.patch(one)
    with pytest.raises(ValueError, match="ModuleDict holds 2 φ-balanced models; ask for the balancer of one of them"):
        phb.get_balancer(both)
    assert phb.get_balancer(both["one"]).root is both["one"]


# ---------------------------------------------------------------------- the flag


def test_a_load_without_the_flag_is_said(tmp_path, warned):
    """The config.json of a model saved while balanced has the flag."""
    ordinary().save_pretrained(tmp_path)
    model = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(warned.about("is loaded without balancing: its config.json does not ask for it")) == 1
    phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=False)
    phb.patch(model).save_pretrained(tmp_path)
    phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(warned.about("is loaded without balancing")) == 1


@pytest.mark.slow
def test_strengths_of_0_are_not_called_balancing(tmp_path, warned):
    make_trainer(patched(coef=0.0), tmp_path, max_steps=1).train()
    assert warned.about("Nothing is balanced in Trainer, only the loads are counted: method='phi', coef=0.0")
    assert not warned.about("φ-balancing is on")


# ---------------------------------------------------------------------- patched late, or given to the wrong optimizer


def optimizer_first(model):
    optimizer = SGD(model.parameters(), lr=0.0)
    return optimizer, model


def prepared_first(model):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.0))
    return optimizer, model


def compiled_first(model):
    return SGD(model.parameters(), lr=0.0), torch.compile(model, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("first", [optimizer_first, prepared_first, compiled_first])
def test_patched_after(first):
    """The optimizer, accelerate's `prepare` or `torch.compile` came before. The coefficient still arrives."""
    watches = []
    for balanced in (True, False):
        model = ordinary().train()
        optimizer, wrapped = first(model)
        if balanced:
            priced(phb.patch(wrapped, {"coef": 0.5}))
        watch = Watch(model)
        for batch in DATA[:2]:
            wrapped(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        watches.append(watch.close())
    assert_declared(*watches)


def without_routers(model):
    return model, [p for name, p in model.named_parameters() if "gate.weight" not in name]


def the_head_alone(model):
    return model, list(model.lm_head.parameters())


def before_the_adapter(model):
    parameters = list(model.parameters())
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), parameters


@pytest.mark.slow
@pytest.mark.parametrize("choose", [without_routers, the_head_alone, before_the_adapter])
def test_an_optimizer_that_does_not_hold_what_balancing_moves(choose, model, warned):
    model, parameters = choose(model)
    optimizer, said = SGD(parameters, lr=0.01), []
    for number in range(STEPS):
        model(**DATA[number % 4]).loss.backward()
        optimizer.step()
        model.zero_grad()
        said.append(len(warned.about("but no optimizer that has stepped holds them")))
    assert said == [0] * 7 + [1, 1]


def test_an_optimizer_that_holds_them_is_not_blamed(model, warned):
    """Two optimizers that share the model, and frozen routers with trained layers."""
    model.model.layers[0].mlp.gate.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [SGD(parameters[:5], lr=0.0), SGD(parameters[5:], lr=0.0)]
    for number in range(STEPS):
        model(**DATA[number % 4]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert not warned.about("no optimizer that has stepped holds them")


def test_routers_in_16_bits_in_a_loop_of_ones_own(warned):
    """Also if a cast of the whole model undid `fp32_routers`. The remedy works."""
    take_steps(patched().to(torch.bfloat16), 1)
    assert len(warned.about("Routers are trained in bfloat16")) == 1
    warned.lines.clear()
    model = phb.patch(ordinary().to(torch.bfloat16), {"coef": 0.1, "fp32_routers": True})
    phb.patch(model.to(torch.bfloat16))
    take_steps(model, 1)
    assert not warned.about("Routers are trained in")


# ---------------------------------------------------------------------- wrong announcements, unused forwards


def test_other_batches_than_announced(model, warned):
    phb.get_balancer(model).begin_step(DATA[1:2])
    take_steps(model, 1, learning_rate=0.0, seed=9)
    phb.get_balancer(model).check_finite()
    assert warned.about("1 optimizer step(s) so far had other tokens than begin_step() was told")


def test_batches_whose_tokens_cannot_be_counted(warned):
    """The loop makes labels after announcing the step. A forward without labels raises."""
    model = patched(token_mask="labels")
    bare = {name: value for name, value in DATA[0].items() if name != "labels"}
    phb.get_balancer(model).begin_step([bare])
    assert warned.about("The micro-batches do not hold what token_mask='labels' needs; each will get the mean")
    with pytest.raises(ValueError, match=r"token_mask='labels', but this forward received no labels. Pass them to"):
        model(**bare)


def test_a_mask_that_padding_cannot_be_read_off(model):
    batch = tiny_batch(model)
    with pytest.raises(
        ValueError, match=r"needs an attention_mask of shape \(batch, sequence\), got of shape \(2, 1, 8\)"
    ):
        model(**batch | {"attention_mask": batch["attention_mask"][:, None]})


def test_a_forward_for_a_metric_keeps_its_graph(model, warned):
    optimizer = SGD(model.parameters(), lr=0.0)
    kept = model(**DATA[1])
    model(**DATA[0]).loss.backward()
    optimizer.step()
    assert warned.about("A training forward that was alive during the backward got none of it") and kept


@pytest.mark.slow
def test_prompt_tuning_behind_the_balancers_back(warned):
    """Its optimizer has no parameter of the patched model. `get_balancer(the PEFT model)` tells the balancer."""
    for told in (False, True):
        warned.lines.clear()
        model = get_peft_model(patched(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
        balancer = phb.get_balancer(model if told else model.get_base_model())
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for number in range(STEPS):
            model(**DATA[number % 4]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert balancer.steps == STEPS * told
        assert len(warned.about("trains nothing itself, so its means and biases do not move")) == 1 - told


# ---------------------------------------------------------------------- trainers


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda t: setattr(t.args, "_n_gpu", 2), "this process drives 2 GPUs by torch.nn.DataParallel"),
        (lambda t: setattr(t, "get_tp_size", lambda: 2), "tp_size=2, but not by transformers"),
        (
            lambda t: (setattr(t, "is_deepspeed_enabled", True), setattr(t.args, "fp16", True)),
            "DeepSpeed keeps its fp16 loss scale to itself.*Train with bf16=True",
        ),
    ],
    ids=["DataParallel", "tensor parallelism", "DeepSpeed in fp16"],
)
def test_trainers_whose_scale_is_not_known(prepare, message, model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    assert trainer.args.n_gpu <= 1  # the property sets up the devices
    prepare(trainer)
    with pytest.raises(ValueError, match=message):
        phb.attach(trainer)


@pytest.mark.slow
def test_a_reference_that_lost_the_bias_of_its_policy(tmp_path, warned):
    """TRL loads the reference from the policy's folder, without its state."""
    take_steps(patched(bias_coef=2.0)).save_pretrained(tmp_path / "policy")
    policy = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    data = Dataset.from_list([{"prompt": "w10 w20", "chosen": "w64 w65", "rejected": "w70"}] * 4)
    arguments = DPOConfig(
        str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no"
    )
    trainer = DPOTrainer(policy, args=arguments, train_dataset=data, processing_class=tokenizer())
    phb.attach(trainer)
    assert len(warned.about("not its selection bias: it has been given that bias")) == 1
    assert torch.equal(logits(trainer.ref_model), logits(policy))


def test_an_engine_that_generates_without_the_bias(tmp_path, warned):
    trainer = make_trainer(patched(bias_coef=0.1), tmp_path)
    trainer.args.use_vllm = True
    phb.attach(trainer)
    assert warned.about("use_vllm=True hands the weights over to vLLM during training, but not the selection bias")


@pytest.mark.slow
def test_resumed_with_routers_that_were_not_trained_then(tmp_path):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    make_trainer(patched(), tmp_path, max_steps=1, **options).train()
    trainer = make_trainer(patched(method="frozen", coef=0.0), tmp_path, max_steps=2, **options)
    with pytest.raises(ValueError, match="trained other parameters than this run: was one of the two balanced"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_best_checkpoint_without_duals(tmp_path, warned):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        patched(), tmp_path, max_steps=1, eval_dataset=rows(2), load_best_model_at_end=True, **every
    )
    trainer.add_callback(Forgetful())
    trainer.train()
    assert warned.about(f"has no {STATE_NAME}: its weights get the duals of the last step")


class Forgetful(transformers.TrainerCallback):
    """Removes the state of each checkpoint, like a sync that copies only weights."""

    def on_save(self, args, state, control, **kwargs):
        for path in Path(args.output_dir).glob(f"*/{STATE_NAME}"):
            path.unlink()


# ---------------------------------------------------------------------- adapters, uploads


@pytest.mark.slow
def test_transformers_loads_an_adapter_with_its_bias(tmp_path, warned):
    """The user calls `model.load_adapter` and not PEFT. On a balanced base, and on an unbalanced one."""
    ordinary().save_pretrained(tmp_path / "base")
    load = phb.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "base", phi_balance={"coef": 0.1, "bias_coef": 2.0})
    config = LoraConfig(r=4, target_modules=["o_proj"], target_parameters=["mlp.gate.weight"])
    model = take_steps(get_peft_model(model, config))
    model.save_pretrained(tmp_path / "adapter")
    for flag in (True, False):
        warned.lines.clear()
        other = load(tmp_path / "base", phi_balance=flag and {"coef": 0.1, "bias_coef": 2.0})
        other.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(other), logits(model)) is flag
        assert bool(warned.about("is lost on this base. Load the base with phi_balance=True")) is not flag
    assert isinstance(load(tmp_path / "adapter"), PeftModel)


def test_an_upload_while_offline(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"me/mine cannot be uploaded while HF_HUB_OFFLINE=1. Unset it, or give dry_run"
    ):
        phb.push_to_hub(model, "me/mine")


@pytest.mark.parametrize("mark", ["device_mesh", "ds_shape"])
def test_an_upload_of_a_part(mark, model, tmp_path):
    """Each rank holds a part of the parameters, with the marks of torch and DeepSpeed."""
    setattr(next(model.parameters()), mark, torch.Size([2, 2]))
    with pytest.raises(ValueError, match="the model is sharded over ranks, so this process holds only a part of it"):
        phb.push_to_hub(model, "me/mine", dry_run=tmp_path / "dry")
