"""Models that are wrapped, dispatched, copied, pruned, interrupted or of remote code: same gradients, same counts."""

import contextlib
import copy
import io
import os
import re

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import set_prices, tiny_batch, tiny_model
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import hf_phibalance as phb
from hf_phibalance.balancing.duals import STATE_NAME
from hf_phibalance.maths.pricing import routing_probs


COEF = 2.0


def patched(model_type="mixtral", config=None, **overrides):
    model = phb.patch(tiny_model(model_type, **overrides).train(), {"coef": COEF, **(config or {})})
    set_prices(model)
    return model


def gradients(model, batch):
    """Gradient of each trainable parameter of one forward and backward, by the name in `model`."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_definition(model, batch):
    """Gradient of COEF · Σ_layers mean over counted tokens of ⟨q, p⟩, by autograd, from what the routers returned."""
    balancer = phb.get_balancer(model)
    logits, handles = {}, []
    for site in balancer.sites:
        for module in site.modules:

            def note(module, args, output, name=site.name):
                logits[name] = output[0]

            handles.append(module.register_forward_hook(note))
    model.zero_grad()
    model(**batch)
    for handle in handles:
        handle.remove()
    balancer.discard_step()
    mask = batch["attention_mask"].reshape(-1).float()
    term = sum(
        ((routing_probs(logits[site.name], site.scoring) * balancer.prices()[site.name]).sum(-1) * mask).sum()
        for site in balancer.sites
    )
    (COEF * term / mask.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_charged_as_defined(model, batch):
    """The gradient with prices minus the one without == the definition's."""
    charged = gradients(model, batch)
    phb.patch(model, {"coef": 0.0})
    task = gradients(model, batch)
    phb.get_balancer(model).discard_step()
    expected = by_definition(model, batch)
    phb.patch(model, {"coef": COEF})
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5)


def ours(model):
    """Our hooks on any module of `model`."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if type(hook).__module__.startswith("hf_phibalance")]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---------------------------------------------------------------------- PEFT


LORA = {"r": 4, "lora_alpha": 8}
PARAMETERS = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "parameters": LoraConfig(target_parameters=PARAMETERS, **LORA),
    "modules_to_save": LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"], **LORA),
    "attention": LoraConfig(target_modules=["o_proj"], **LORA),
}


def adapted(model, adapter):
    """`model` under PEFT, with adapters that already do something."""
    model = get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_peft_gradient_is_that_of_the_definition(model_type, adapter, order):
    if order == "before":
        model = adapted(patched(model_type), adapter)
    else:
        model = phb.patch(adapted(tiny_model(model_type), adapter), {"coef": COEF})
        set_prices(model)
    balancer = phb.get_balancer(model)
    assert balancer.layer_names == phb.get_balancer(patched(model_type)).layer_names
    batch = tiny_batch(model)
    assert_charged_as_defined(model, batch)
    gradients(model, batch)
    phb.get_balancer(model).step()
    assert all(load.sum() == 2 * batch["attention_mask"].sum() for load in phb.get_balancer(model).loads().values())


@pytest.mark.parametrize("adapter", ["parameters", "modules_to_save"])
def test_order_of_patch_and_peft_does_not_matter(adapter):
    config = {"coef": COEF, "bias_coef": 0.2, "ema_rate": 0.5}
    results = []
    for order in ("before", "after"):
        model = tiny_model("deepseek_v3")
        model = adapted(phb.patch(model, config) if order == "before" else model, adapter)
        balancer = phb.get_balancer(phb.patch(model) if order == "before" else phb.patch(model, config))
        grads = []
        for seed in range(3):
            grads.append(gradients(model, tiny_batch(model, seed=seed)))
            balancer.step()
        results.append((grads, balancer.state_dict()))
    for left, right in zip(results[0][0], results[1][0]):
        assert_equal(left, right)
    assert_equal(results[0][1], results[1][1])
    # the routers in use carry the bias
    buffers = {name: buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name}
    active = {name: buffer for name, buffer in buffers.items() if "original_module" not in name}
    assert len(active) == 2
    for buffer, bias in zip(active.values(), balancer.biases().values()):
        assert bias.any() and torch.equal(buffer, bias)


def test_native_bias_reaches_copies_that_peft_makes_after_patching():
    """... without a second `patch`: in a raw loop, and when duals are loaded."""
    model = adapted(patched("deepseek_v3", {"bias_coef": 0.2}), "modules_to_save")
    balancer = phb.get_balancer(model)
    gates = [model.base_model.model.model.layers[i].mlp.gate.modules_to_save["default"] for i in (1, 2)]
    gradients(model, tiny_batch(model))
    balancer.step()
    for gate, bias in zip(gates, balancer.biases().values()):
        assert bias.any() and torch.equal(gate.e_score_correction_bias, bias)
    model = adapted(patched("deepseek_v3", {"bias_coef": 0.2}), "modules_to_save")
    gates = [model.base_model.model.model.layers[i].mlp.gate.modules_to_save["default"] for i in (1, 2)]
    phb.get_balancer(model).load_state_dict(balancer.state_dict())
    for gate, bias in zip(gates, balancer.biases().values()):
        assert torch.equal(gate.e_score_correction_bias, bias)


def test_state_moves_between_wrapped_and_plain_models(tmp_path):
    model = adapted(patched(), "parameters")
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    phb.get_balancer(model).save(tmp_path)
    plain = phb.patch(tiny_model("mixtral"), {"coef": COEF})
    phb.get_balancer(plain).load(tmp_path)
    assert_equal(phb.get_balancer(plain).state_dict(), phb.get_balancer(model).state_dict())
    other = phb.patch(adapted(tiny_model("mixtral"), "modules_to_save"), {"coef": COEF})
    phb.get_balancer(other).load_state_dict(phb.get_balancer(plain).state_dict())
    assert_equal(phb.get_balancer(other).prices(), phb.get_balancer(model).prices())


def lora_on(parameters=None, modules=None, layers=None):
    return LoraConfig(target_parameters=parameters, target_modules=modules, layers_to_transform=layers, **LORA)


def test_frozen_routers_above_trained_layers_only(warned):
    """Adapters on the last layer's attention: the gradient reaches them from the last router alone."""
    model = get_peft_model(patched(), lora_on(modules=["o_proj"], layers=[2])).train()
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    (warning,) = warned.about("reaches no trainable parameter")
    assert "model.layers.0.mlp.gate" in warning and "model.layers.1.mlp.gate" in warning
    assert "model.layers.2.mlp.gate" not in warning


def test_all_frozen_below_is_refused_with_a_remedy_that_works():
    frozen = get_peft_model(patched(), lora_on(parameters=["layers.2.mlp.experts.down_proj"], modules=[])).train()
    before = phb.get_balancer(frozen).state_dict()
    gradients(frozen, tiny_batch(frozen))
    with pytest.raises(ValueError, match=r"coef=2.0 but no gradient path") as error:
        phb.get_balancer(frozen).step()
    assert_equal(phb.get_balancer(frozen).state_dict(), before)
    (suggested,) = re.findall(r"target_parameters=\['([^']+)'", str(error.value))
    model = get_peft_model(patched(), lora_on(parameters=[suggested], modules=[])).train()
    grads = gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    assert len(grads) == 6 and any(gradient.any() for gradient in grads.values())
    biased = patched("mixtral", {"coef": 0.0, "bias_coef": 0.1})  # the other remedy
    biased = get_peft_model(biased, lora_on(parameters=["layers.2.mlp.experts.down_proj"], modules=[])).train()
    gradients(biased, tiny_batch(biased))
    phb.get_balancer(biased).step()
    assert all(bias.any() for bias in phb.get_balancer(biased).biases().values())


@pytest.mark.parametrize("adapter", ["parameters", "modules_to_save"])
def test_merged_model_stays_patched(adapter):
    model = adapted(patched("mixtral", {"bias_coef": 0.1}), adapter)
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    before = phb.get_balancer(model).state_dict()
    merged = model.merge_and_unload().train()
    assert phb.get_balancer(merged).layer_names == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    assert_equal(phb.get_balancer(merged).state_dict(), before)
    assert_charged_as_defined(merged, tiny_batch(merged))
    gradients(merged, tiny_batch(merged))
    phb.get_balancer(merged).step()
    assert not ours(phb.unpatch(merged))


@pytest.mark.parametrize("order", ["before", "after"])
def test_peft_saves_the_sidecar_and_the_adapter_loads_as_ever(order, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if order == "before":
        model = phb.patch(adapted(phb.patch(base, {"coef": COEF}), "parameters"))
    else:
        model = phb.patch(adapted(base, "parameters"), {"coef": COEF})
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert STATE_NAME in os.listdir(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "not written", is_main_process=False)
    assert not (tmp_path / "not written" / STATE_NAME).exists()

    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = phb.patch(PeftModel.from_pretrained(fresh, tmp_path / "adapter"), {"coef": COEF})
    phb.get_balancer(loaded).load(tmp_path / "adapter")
    assert_equal(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**tiny_batch(model)).logits, model(**tiny_batch(model)).logits)
    flagged = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", phi_balance={"coef": COEF})
    assert_equal(phb.get_balancer(flagged).state_dict(), phb.get_balancer(model).state_dict())


def test_reference_forward_without_adapter_does_not_count():
    """As DPO does: the same model, adapters off, no gradient, in between."""
    model = adapted(patched(), "parameters")
    balancer = phb.get_balancer(model)
    expected = gradients(model, tiny_batch(model))
    balancer.discard_step()
    model.zero_grad()
    output = model(**tiny_batch(model))
    with torch.no_grad(), model.disable_adapter():
        model(**tiny_batch(model, seed=1))
    output.loss.backward()
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    balancer.step()
    assert balancer.metrics()["tokens"] == tiny_batch(model)["attention_mask"].sum()


# ---------------------------------------------------------------------- accelerate, torch wrappers


def instance_hooks(model):
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def dispatched(model):
    devices = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    devices |= {f"model.layers.{i}": "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, devices, force_hooks=True)


@pytest.mark.parametrize("how", [instance_hooks, dispatched])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_dispatched_model_trains_the_same(how, order, model_type, token_mask):
    config = {"bias_coef": 0.1, "token_mask": token_mask}
    reference = patched(model_type, config)
    if order == "before":
        model = how(patched(model_type, config))
    else:
        model = phb.patch(how(tiny_model(model_type).train()), {"coef": COEF, **config})
        set_prices(model)
    assert any("forward" in vars(module) for module in model.modules())
    for seed in range(2):
        batch = tiny_batch(model, seed=seed)
        assert_equal(gradients(model, batch), gradients(reference, batch))
        phb.get_balancer(model).step()
        phb.get_balancer(reference).step()
    assert_equal(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())
    assert_equal(phb.get_balancer(model).loads(), phb.get_balancer(reference).loads())
    assert not ours(phb.unpatch(model))
    plain = tiny_model(model_type).train()
    plain.load_state_dict(model.state_dict())
    assert_equal(gradients(model, batch), gradients(plain, batch))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_offloaded_model_counts_the_same(where, order, model_type, tmp_path):
    def offload(model):
        if where == "cpu":
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        return accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))

    reference = patched(model_type)
    if order == "before":
        model = offload(patched(model_type))
    else:
        model = phb.patch(offload(tiny_model(model_type)), {"coef": COEF})
        set_prices(model)
    assert next(model.parameters()).device.type == "meta"
    counted = []
    for one in (model, reference):
        balancer = phb.get_balancer(one)
        with balancer.evaluation(), torch.no_grad():
            one.eval()(**tiny_batch(reference))
            counted.append(balancer.eval_metrics())
        one.train()(**tiny_batch(reference))
        balancer.step()
    assert counted[0] == counted[1] and counted[0]["tokens"] > 0
    assert_equal(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


def test_bias_of_an_offloaded_model_is_refused_where_it_would_be_lost():
    model = accelerate.cpu_offload(tiny_model("ernie4_5_moe"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"bias_coef=0.1 is not possible while.*offloaded.*Set bias_coef=0"):
        phb.patch(model, {"bias_coef": 0.1})
    assert not ours(model) and not hasattr(model.config, "phi_balance")


@pytest.fixture
def one_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "data_parallel": nn.DataParallel,
    "compile": compiled,
    "ddp of compile": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compile of ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "ddp of peft": lambda model: nn.parallel.DistributedDataParallel(adapted(model, "parameters")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_interface_reaches_through_wrappers(wrapper, one_rank, tmp_path):
    inner = tiny_model("mixtral").train()
    model = WRAPPERS[wrapper](inner)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM is not φ-balanced; call phb.patch"):
        phb.get_balancer(model)
    assert phb.unpatch(model) is model
    attributes = set(vars(inner))
    assert phb.patch(model, {"coef": COEF}) is model
    balancer = phb.get_balancer(model)
    assert balancer is phb.get_balancer(inner) and balancer.root is inner
    assert balancer.layer_names == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    assert phb.patch(model) is model and phb.get_balancer(model) is balancer
    inner.save_pretrained(tmp_path)
    assert STATE_NAME in os.listdir(tmp_path)
    assert phb.unpatch(model) is model and not ours(model) and set(vars(inner)) == attributes
    assert phb.unpatch(model) is model
    phb.patch(inner, {"coef": COEF})
    assert phb.get_balancer(model).root is inner
    phb.unpatch(inner)


@pytest.mark.parametrize("wrapper", ["ddp", "ddp of peft"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_ddp_trains_the_same(wrapper, order, one_rank):
    def make():
        return adapted(tiny_model("mixtral"), "parameters") if "peft" in wrapper else tiny_model("mixtral").train()

    reference = phb.patch(make(), {"coef": COEF, "bias_coef": 0.1})
    if order == "before":
        model = nn.parallel.DistributedDataParallel(phb.patch(make(), {"coef": COEF, "bias_coef": 0.1}))
    else:
        model = phb.patch(nn.parallel.DistributedDataParallel(make()), {"coef": COEF, "bias_coef": 0.1})
    set_prices(model)
    set_prices(reference)
    for seed in range(2):
        batch = tiny_batch(reference, seed=seed)
        grads = {name.removeprefix("module."): grad for name, grad in gradients(model, batch).items()}
        assert_equal(grads, gradients(reference, batch))
        phb.get_balancer(model).step()
        phb.get_balancer(reference).step()
    assert_equal(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


def test_replicas_of_data_parallel_are_refused():
    model = patched()
    model.model._is_replica = True  # as torch.nn.parallel.replicate marks the copies that its threads run
    with pytest.raises(RuntimeError, match=r"DataParallel.*(torchrun|DistributedDataParallel|one GPU)"):
        model(**tiny_batch(model))


# ---------------------------------------------------------------------- copies and pickles


def rebuilt(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_a_copy_has_a_balancer_of_its_own(how, model_type, token_mask, tmp_path):
    config = {"bias_coef": 0.1, "token_mask": token_mask}
    model, twin = patched(model_type, config), patched(model_type, config)
    for one in (model, twin):
        gradients(one, tiny_batch(one))
        phb.get_balancer(one).step()
    other = rebuilt(model, how)
    balancer = phb.get_balancer(other)
    assert balancer is not phb.get_balancer(model) and balancer.root is other
    assert len(ours(other)) == len(ours(model)) and all(hook.balancer is balancer for hook in ours(other))
    before = phb.get_balancer(model).state_dict()
    for seed in (3, 4):  # goes on as the original would have
        assert_equal(gradients(other, tiny_batch(other, seed=seed)), gradients(twin, tiny_batch(twin, seed=seed)))
        balancer.step()
        phb.get_balancer(twin).step()
    assert_equal(balancer.state_dict(), phb.get_balancer(twin).state_dict())
    assert_equal(phb.get_balancer(model).state_dict(), before)
    for site in phb.get_balancer(model).sites:
        if site.native_bias:
            assert torch.equal(site.read_native_bias(), before[f"{site.name}.bias"])

    other.eval().save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(phb.get_balancer(loaded).state_dict(), balancer.state_dict())

    phb.unpatch(other)
    plain = tiny_model(model_type)
    assert vars(other).keys() == vars(plain).keys() and not ours(other)
    assert other.config.to_dict().keys() == plain.config.to_dict().keys()
    assert phb.get_balancer(model) is not None and len(ours(model)) > 0


def test_copy_of_a_model_in_the_middle_of_a_step():
    model = patched()
    phb.get_balancer(model).begin_step([tiny_batch(model)] * 2)
    output = model(**tiny_batch(model))
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        reference(**tiny_batch(model))
    output.loss.backward()
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    assert phb.get_balancer(model).metrics()["tokens"] == 2 * tiny_batch(model)["attention_mask"].sum()
    with pytest.raises(RuntimeError, match="before any training forward"):
        phb.get_balancer(reference).step()


def test_copy_of_a_router_alone_belongs_to_the_same_balancer():
    """What PEFT does for `modules_to_save`."""
    model = patched()
    copied = copy.deepcopy(model.model.layers[0].mlp.gate)
    assert {id(hook.balancer) for hook in ours(copied)} == {id(phb.get_balancer(model))}


# ---------------------------------------------------------------------- patch and unpatch


def test_unpatch_twice_and_on_a_model_that_was_never_patched():
    model = tiny_model("mixtral")
    attributes, config = dict(vars(model)), model.config.to_dict()
    assert phb.unpatch(model) is model and vars(model) == attributes
    phb.patch(model, {"coef": COEF, "token_mask": "labels"})
    assert phb.unpatch(model) is model and phb.unpatch(model) is model
    assert vars(model).keys() == attributes.keys() and model.config.to_dict() == config
    assert "forward" not in vars(model) and not ours(model)


def test_patching_twice_is_the_same_as_once():
    model, twice = patched(), patched()
    phb.patch(phb.patch(twice), {"coef": COEF})
    assert len(ours(twice)) == len(ours(model))
    assert_equal(gradients(twice, tiny_batch(model)), gradients(model, tiny_batch(model)))


def test_patch_with_a_new_config_keeps_the_duals():
    model = patched("mixtral", {"bias_coef": 0.1})
    gradients(model, tiny_batch(model))
    balancer = phb.get_balancer(model)
    balancer.step()
    before = balancer.state_dict()
    phb.patch(model, {"coef": 0.25, "bias_coef": 0.2, "ema_rate": 0.9, "potential": "log_cosh"})
    changed = phb.get_balancer(model)
    assert changed.config.coef == 0.25 and len(ours(model)) == len(ours(patched("mixtral", {"bias_coef": 0.1})))
    assert_equal(changed.state_dict(), before)
    assert not torch.equal(*(b.prices()["model.layers.0.mlp.gate"] for b in (balancer, changed)))
    assert model.config.phi_balance == changed.config.to_dict()
    phb.unpatch(model)
    assert not hasattr(model.config, "phi_balance")


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("mixtral", {"coef": -1.0}, "coef"),
        ("mixtral", {"coef": 1.0, "from_the_future": 1, "version": "99.0"}, "from_the_future.*99.0.*Upgrade"),
        ("mixtral", {"potential": "shannon"}, "potential"),
        ("mixtral", "yes", "PhiBalanceConfig"),
        ("mixtral", False, "PhiBalanceConfig"),
        ("phimoe", {"bias_coef": 0.1}, "bias_coef=0.1 is not possible.*sparsemixer.*Set bias_coef=0"),
        ("doge", {}, "product keys"),
    ],
)
@pytest.mark.parametrize("already", [False, True], ids=["plain", "patched"])
def test_a_refused_patch_leaves_the_model_as_it_was(model_type, config, message, already):
    if already and model_type == "doge":
        pytest.skip("cannot be patched at all")
    model = patched(model_type) if already else tiny_model(model_type)
    attributes, hooks, written = dict(vars(model)), ours(model), model.config.to_dict()
    state = phb.get_balancer(model).state_dict() if already else {}
    with pytest.raises(ValueError, match=message):
        phb.patch(model, config)
    assert vars(model) == attributes and ours(model) == hooks and model.config.to_dict() == written
    if already:
        assert_equal(phb.get_balancer(model).state_dict(), state)


def test_a_model_without_routers_is_refused():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no router.*supported_families"):
        phb.patch(model, True)
    assert not hasattr(model.config, "phi_balance")


def test_use_kernels_is_refused(monkeypatch):
    model = tiny_model("gpt_oss")
    attributes = dict(vars(model))
    monkeypatch.setattr(type(model.model.layers[0].mlp), "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    phb.unpatch(phb.patch(model, {}))  # the kernel is not in use
    model._use_kernels = True
    with pytest.raises(ValueError, match=r"MegaBlocksMoeMLP.*model.layers.0.mlp.router.*use_kernels=False"):
        phb.patch(model, {})
    del model._use_kernels
    assert vars(model) == attributes and not ours(model)


def test_a_bypassed_router_is_refused_at_the_first_step():
    model = patched()
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: block.experts(
        hidden.reshape(-1, 32), torch.zeros(16, 2, dtype=torch.long), torch.ones(16, 2)
    ).view_as(hidden)
    before = phb.get_balancer(model).state_dict()
    gradients(model, tiny_batch(model))
    with pytest.raises(ValueError, match=r"1 of 3 patched routers were never called.*model.layers.1.mlp.gate"):
        phb.get_balancer(model).step()
    assert_equal(phb.get_balancer(model).state_dict(), before)


# ---------------------------------------------------------------------- who counts


def tokens_of(balancer):
    """Tokens counted since the last step, `None` if there was no training forward."""
    try:
        balancer.step()
    except RuntimeError:
        return None
    return balancer.metrics()["tokens"]


def test_only_training_forwards_count_and_pay():
    model = patched()
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    before = balancer.state_dict()
    with torch.no_grad():
        model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    assert tokens_of(balancer) is None
    assert_equal(balancer.state_dict(), before)

    evaluated = gradients(model, batch)  # gradients in eval mode, say for an attribution
    plain = tiny_model("mixtral")
    assert_equal(evaluated, gradients(plain, batch))
    assert tokens_of(balancer) is None

    model.train()
    assert any(not torch.equal(g, evaluated[name]) for name, g in gradients(model, batch).items())
    assert tokens_of(balancer) == batch["attention_mask"].sum()


def test_evaluation_counts_apart_and_generation_does_not():
    model = patched("mixtral", {"bias_coef": 0.1})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    gradients(model, batch)
    before, step_metrics = balancer.state_dict(), balancer.metrics()
    model.eval()
    with balancer.evaluation():
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        assert balancer.eval_metrics() == {}
        with torch.no_grad():
            for seed in range(2):
                model(**tiny_batch(model, seed=seed))
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        assert balancer.eval_metrics()["tokens"] == 2 * batch["attention_mask"].sum()
    with pytest.raises(RuntimeError, match=r"inside `with balancer.evaluation"):
        balancer.eval_metrics()
    assert balancer.metrics() == step_metrics
    assert_equal(balancer.state_dict(), before)
    assert tokens_of(balancer) == batch["attention_mask"].sum()


def test_evaluation_between_forward_and_backward_does_not_disturb():
    for checkpointing in (None, False, True):
        model, reference = patched(), patched()
        for one in (model, reference):
            if checkpointing is not None:
                one.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        batch = tiny_batch(model)
        expected = gradients(reference, batch)
        output = model(**batch)
        model.eval()
        with phb.get_balancer(model).evaluation(), torch.no_grad():
            model(**tiny_batch(model, seed=1))
        model.train()
        output.loss.backward()
        assert_equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)
        phb.get_balancer(model).step()
        phb.get_balancer(reference).step()
        assert_equal(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


def test_a_layer_called_by_itself_neither_counts_nor_fails():
    model = patched("mixtral", {"bias_coef": 0.1})
    gradients(model, tiny_batch(model))
    hidden = torch.randn(1, 5, 32, requires_grad=True)
    for one in (model, phb.unpatch(patched("mixtral", {"bias_coef": 0.1}))):
        with torch.no_grad():
            one.model.layers[1].mlp(hidden)
    model.model.layers[1].mlp(hidden).sum().backward()
    own = hidden.grad.clone()
    hidden.grad = None
    set_prices(model, seed=7)  # other prices, same gradient
    model.model.layers[1].mlp(hidden).sum().backward()
    assert torch.equal(hidden.grad, own)
    assert tokens_of(phb.get_balancer(model)) == tiny_batch(model)["attention_mask"].sum()


# ---------------------------------------------------------------------- interruptions


@contextlib.contextmanager
def broken(module, error, after):
    """`module` raises in its forward, before or after doing its work."""
    forward = module.forward

    def failing(*args, **kwargs):
        if after:
            forward(*args, **kwargs)
        raise error

    module.forward = failing
    yield
    module.forward = forward


@pytest.mark.parametrize("error", [ValueError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["gate", "experts", "self_attn"])
@pytest.mark.parametrize("model_type", ["mixtral", "dbrx"])
@pytest.mark.parametrize("announced", [False, True], ids=["implicit", "announced"])
def test_an_interrupted_forward_leaves_nothing_behind(model_type, where, error, announced):
    config = {"bias_coef": 0.3}
    model, reference = patched(model_type, config), patched(model_type, config)
    for one in (model, reference):  # a bias that matters
        gradients(one, tiny_batch(one, seed=5))
        phb.get_balancer(one).step()
    modules = dict((model.model.layers if model_type == "mixtral" else model.transformer.blocks)[1].named_modules())
    target = {
        "mixtral": {"gate": "mlp.gate", "experts": "mlp.experts", "self_attn": "self_attn"},
        "dbrx": {"gate": "ffn.router", "experts": "ffn.experts", "self_attn": "norm_attn_norm.attn"},
    }[model_type][where]
    balancer = phb.get_balancer(model)
    if announced:
        balancer.begin_step([tiny_batch(model)])
    with broken(modules[target], error, after=True), pytest.raises(type(error)):
        model(**tiny_batch(model))
    if isinstance(error, ValueError):
        assert _get_current_function_mode_stack() == []
    if announced:
        with pytest.raises(RuntimeError, match="discard_step"):
            balancer.begin_step([tiny_batch(model, seed=1)])
        balancer.discard_step()
    for seed in (1, 2):
        batch = tiny_batch(model, seed=seed)
        assert_equal(gradients(model, batch), gradients(reference, batch))
        balancer.step()
        phb.get_balancer(reference).step()
    assert _get_current_function_mode_stack() == []
    assert_equal(balancer.state_dict(), phb.get_balancer(reference).state_dict())
    assert_equal(balancer.loads(), phb.get_balancer(reference).loads())


def test_modes_of_others_survive():
    """The stack of function modes is shared with `torch.device` contexts and users' own modes."""
    model = patched("mixtral", {"bias_coef": 0.3})
    expected = gradients(model, tiny_batch(model))
    phb.get_balancer(model).discard_step()
    gate = model.model.layers[1].mlp.gate

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def refuse(module, args):
        raise ValueError("a hook before ours")

    with Mode() as mode:
        assert_equal(gradients(model, tiny_batch(model)), expected)
        phb.get_balancer(model).discard_step()
        model.zero_grad()
        handle = gate.register_forward_pre_hook(refuse, prepend=True)
        with pytest.raises(ValueError, match="a hook before ours"):
            model(**tiny_batch(model))
        handle.remove()
        assert _get_current_function_mode_stack() == [mode]
        with broken(gate, KeyboardInterrupt(), after=False), pytest.raises(KeyboardInterrupt):
            model(**tiny_batch(model))
        phb.get_balancer(model).discard_step()
        assert_equal(gradients(model, tiny_batch(model)), expected)
        assert _get_current_function_mode_stack() == [mode]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_move_nothing(value, warned):
    model = patched("mixtral", {"bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    gradients(model, tiny_batch(model))
    balancer.step()
    balancer.check_finite()
    before, prices = balancer.state_dict(), balancer.prices()
    gate = model.model.layers[1].mlp.gate.weight
    good = gate.detach().clone()
    with torch.no_grad():
        gate[3, 0] = value
    gradients(model, tiny_batch(model))
    balancer.step()
    after = balancer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name != "steps")
    assert_equal(balancer.prices(), prices)
    assert not warned.about("not finite")
    balancer.check_finite()
    assert len(warned.about("1 step(s) were not finite")) == 1
    with torch.no_grad():
        gate.copy_(good)
    gradients(model, tiny_batch(model))
    balancer.step()
    assert all(torch.isfinite(tensor).all() for tensor in balancer.state_dict().values())
    assert not torch.equal(balancer.means()["model.layers.0.mlp.gate"], before["model.layers.0.mlp.gate.mean_probs"])


# ---------------------------------------------------------------------- ragged models


def pruned(model, layer, experts):
    """A Mixtral without the last experts of one layer."""
    block = model.model.layers[layer].mlp
    for owner, name in ((block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj")):
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach()[:experts].clone()))
    for owner in (block.gate, block.experts):
        owner.num_experts = experts
    return model


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_routers_with_different_numbers_of_experts(layer, tmp_path):
    config = {"coef": COEF, "bias_coef": 0.2, "ema_rate": 0.5}
    model = phb.patch(pruned(tiny_model("mixtral").train(), layer, 5), config)
    balancer = set_prices(model)
    sizes = [5 if i == layer else 8 for i in range(3)]
    assert [len(price) for price in balancer.prices().values()] == sizes
    assert_charged_as_defined(model, tiny_batch(model))
    balancer = phb.get_balancer(phb.patch(model, config))
    start = balancer.means("load")
    gradients(model, tiny_batch(model))
    balancer.step()
    for name, load in balancer.loads().items():
        assert load.sum() == 2 * tiny_batch(model)["attention_mask"].sum()
        mean = 0.5 * start[name] + 0.5 * load / load.sum()
        torch.testing.assert_close(balancer.means("load")[name], mean)
        price = (len(load) * mean).log()
        torch.testing.assert_close(balancer.biases()[name], -0.2 * (price - price.mean()), rtol=1e-4, atol=1e-6)
    assert all(torch.isfinite(torch.tensor(value)) for value in balancer.metrics().values())
    balancer.save(tmp_path)
    other = phb.patch(pruned(tiny_model("mixtral"), layer, 5), config)
    phb.get_balancer(other).load(tmp_path)
    assert_equal(phb.get_balancer(other).state_dict(), balancer.state_dict())
    with pytest.raises(ValueError, match="another model"):
        phb.get_balancer(phb.patch(tiny_model("mixtral"), config)).load(tmp_path)


def test_pruned_after_patching_is_refused():
    model = patched()
    pruned(model, 1, 5)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate.*\(16, 5\).*\(16, 8\).*atch"):
        model(**tiny_batch(model))
    phb.patch(phb.unpatch(model), {"coef": COEF})
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()


# ---------------------------------------------------------------------- remote code


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_deepseek"
    hidden_size = 16
    vocab_size = 128
    num_hidden_layers = 2
    n_routed_experts = 8
    num_experts_per_tok = 2
    scoring_func = "softmax"
    norm_topk_prob = False
    aux_loss_alpha = 0.05
    corrected = False  # as in Moonlight: selects with a bias, returns no loss


class MoEGate(nn.Module):
    """The contract of the gate that the first DeepSeek-MoE and Moonlight ship, not their code."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.n_routed_experts = config.num_experts_per_tok, config.n_routed_experts
        self.scoring_func, self.norm_topk_prob = config.scoring_func, config.norm_topk_prob
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size))
        if config.corrected:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts))
        else:
            self.alpha = config.aux_loss_alpha

    def forward(self, hidden_states):
        _, _, width = hidden_states.shape
        logits = F.linear(hidden_states.view(-1, width), self.weight)
        scores = logits.softmax(dim=-1) if self.scoring_func == "softmax" else logits.sigmoid()
        if hasattr(self, "e_score_correction_bias"):
            _, topk_idx = torch.topk(
                scores + self.e_score_correction_bias.detach(), k=self.top_k, dim=-1, sorted=False
            )
            topk_weight = scores.gather(1, topk_idx)
        else:
            topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        if hasattr(self, "e_score_correction_bias"):
            return topk_idx, topk_weight
        aux_loss = None
        if self.training and self.alpha > 0.0:
            load = F.one_hot(topk_idx, self.n_routed_experts).float().mean(dim=(0, 1)) * self.n_routed_experts
            aux_loss = (load * scores.mean(dim=0)).sum() * self.alpha
        return topk_idx, topk_weight, aux_loss


class AddAuxiliaryLoss(torch.autograd.Function):
    """Adds the gradient of `loss` to the backward of `x`; like the original it cannot do without a loss."""

    @staticmethod
    def forward(ctx, x, loss):
        assert loss.numel() == 1
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones(1, dtype=ctx.dtype).squeeze()


class RemoteBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.n_routed_experts)
        )

    def forward(self, hidden_states):
        topk_idx, topk_weight, *aux_loss = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        every = torch.stack([expert(flat) for expert in self.experts], dim=1)
        chosen = every.gather(1, topk_idx.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        y = (chosen * topk_weight.unsqueeze(-1)).sum(dim=1).view_as(hidden_states)
        if self.training and aux_loss:
            y = AddAuxiliaryLoss.apply(y, aux_loss[0])
        return hidden_states + y


class RemotePreTrainedModel(PreTrainedModel):
    config_class = RemoteConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        pass


class RemoteModel(RemotePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RemoteBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class RemoteForCausalLM(RemotePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = RemoteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, attention_mask))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)


REMOTE = {
    "deepseek": {},
    "deepseek, normalised": {"norm_topk_prob": True},
    "moonlight": {"corrected": True, "scoring_func": "sigmoid", "norm_topk_prob": True},
}


def remote_model(kind):
    config = RemoteConfig()
    for name, value in REMOTE[kind].items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RemoteForCausalLM(config).train()


def remote_logits(model, batch, probs):
    """Logits of each gate, from the hidden states that it received."""
    logits, handles = [], []
    for layer in model.model.layers:

        def note(module, args):
            logits.append(F.linear(args[0].view(-1, args[0].shape[-1]), module.weight))

        handles.append(layer.gate.register_forward_pre_hook(note))
    model(**batch)
    for handle in handles:
        handle.remove()
    return [routing_probs(z, probs) for z in logits]


@pytest.mark.parametrize("kind", REMOTE)
def test_remote_gate_gradient_is_that_of_the_definition(kind):
    model = remote_model(kind)
    batch = tiny_batch(model)
    phb.patch(model, {"coef": COEF})
    balancer = set_prices(model)
    assert balancer.layer_names == ["model.layers.0.gate", "model.layers.1.gate"]
    charged = gradients(model, batch)
    balancer.step()
    prices = phb.get_balancer(phb.patch(set_prices(model).root, {"coef": 0.0})).prices()
    for layer in model.model.layers:
        layer.gate.alpha = 0.0 if kind == "moonlight" else 1e-300
    task = gradients(model, batch)
    phb.get_balancer(model).discard_step()
    model.zero_grad()
    mask = batch["attention_mask"].reshape(-1).float()
    probs = remote_logits(model, batch, "sigmoid" if kind == "moonlight" else "softmax")
    term = sum(((p * q).sum(-1) * mask).sum() / mask.sum() for p, q in zip(probs, prices.values()))
    (COEF * term).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["deepseek", "moonlight"])
def test_remote_gate_counts_and_selection_bias(kind):
    model = phb.patch(remote_model(kind), {"coef": 0.0, "bias_coef": 0.5, "ema_rate": 1.0})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    assert all(bool(site.native_bias) == (kind == "moonlight") for site in balancer.sites)
    chosen = []
    model.model.layers[0].gate.register_forward_hook(lambda module, args, output: chosen.append(output[:2]))
    gradients(model, batch)
    balancer.step()
    mask = batch["attention_mask"].reshape(-1).bool()
    counts = torch.bincount(chosen[0][0][mask].flatten(), minlength=8).float()
    assert torch.equal(balancer.loads()["model.layers.0.gate"], counts)
    state = balancer.state_dict()
    for name, tensor in state.items():
        if name.endswith(".bias"):
            tensor.zero_()[2:4] = 50.0
    balancer.load_state_dict(state)
    gradients(model, batch)
    topk_idx, topk_weight = chosen[1]
    assert torch.equal(topk_idx.sort().values, torch.tensor([2, 3]).expand(16, 2))
    assert topk_weight.max() < 1.0  # the weights are the unbiased ones
    if kind == "moonlight":
        for layer, bias in zip(model.model.layers, balancer.biases().values()):
            assert torch.equal(layer.gate.e_score_correction_bias, bias)


def test_auxiliary_loss_of_the_remote_gate_is_off_and_comes_back(warned):
    model, plain, without = remote_model("deepseek"), remote_model("deepseek"), remote_model("deepseek")
    for layer in without.model.layers:
        layer.gate.alpha = 1e-300
    batch = tiny_batch(model)
    with_loss = gradients(plain, batch)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.1})
    assert len(warned.about("auxiliary loss")) == 1
    phb.patch(model)  # once more changes nothing
    assert_equal(gradients(model, batch), gradients(without, batch))
    assert any(not torch.equal(gradient, with_loss[name]) for name, gradient in gradients(model, batch).items())
    phb.unpatch(model)
    assert [layer.gate.alpha for layer in model.model.layers] == [0.05, 0.05]
    assert_equal(gradients(model, batch), with_loss)
    phb.patch(model, {"coef": 0.0})  # both levers off: the loss stays
    assert_equal(gradients(model, batch), with_loss)
