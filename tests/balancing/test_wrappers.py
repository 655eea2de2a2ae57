"""Models that accelerate dispatched or offloaded, or torch wrapped: same training, and our interface reaches through."""

import os

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from adapters import adapted
from charging import COEF, gradients, priced
from checks import assert_same, ours
from tiny import set_prices, tiny_batch, tiny_model
from torch import nn

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------- accelerate


def instance_hooks(model):
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def dispatched(model):
    devices = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.phi_balance", "lm_head"), "cpu"
    )
    devices |= {f"model.layers.{i}": "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, devices, force_hooks=True)


@pytest.mark.parametrize("how", [instance_hooks, dispatched])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_dispatched_model_trains_the_same(how, order, model_type, token_mask):
    config = {"bias_coef": 0.1, "token_mask": token_mask}
    reference = priced(model_type, config)
    if order == "before":
        model = how(priced(model_type, config))
    else:
        model = phb.patch(how(tiny_model(model_type).train()), {"coef": COEF, **config})
        set_prices(model)
    assert any("forward" in vars(module) for module in model.modules())
    for seed in range(2):
        batch = tiny_batch(model, seed=seed)
        assert_same(gradients(model, batch), gradients(reference, batch))
        phb.get_balancer(model).step()
        phb.get_balancer(reference).step()
    assert_same(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())
    assert_same(phb.get_balancer(model).loads(), phb.get_balancer(reference).loads())
    assert not ours(phb.unpatch(model))
    plain = tiny_model(model_type).train()
    plain.load_state_dict(model.state_dict())
    assert_same(gradients(model, batch), gradients(plain, batch))


def test_a_model_without_head_that_accelerate_unwraps():
    """accelerate replaces its forward for mixed precision, and looks for the one below when it unwraps."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = phb.patch(tiny_model("mixtral").model.train(), {"coef": COEF})
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.backward(wrapped(**{k: v for k, v in tiny_batch(model).items() if k != "labels"})[0].sum())
    optimizer.step()
    assert phb.get_balancer(model).steps == 1
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_offloaded_model_counts_the_same(where, order, model_type, tmp_path):
    def offload(model):
        if where == "cpu":
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        return accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))

    reference = priced(model_type)
    if order == "before":
        model = offload(priced(model_type))
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
        one.train()(**tiny_batch(reference)).loss.backward()
        balancer.step()
        one.zero_grad()
    assert counted[0] == counted[1] and counted[0]["tokens"] > 0
    assert_same(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


def test_bias_of_an_offloaded_model_is_refused_where_it_would_be_lost():
    model = accelerate.cpu_offload(tiny_model("ernie4_5_moe"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"bias_coef=0.1 is not possible while.*offloaded.*Set bias_coef=0"):
        phb.patch(model, {"bias_coef": 0.1})
    assert not ours(model) and not hasattr(model.config, "phi_balance")


# ---------------------------------------------------------------------- wrappers of torch


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
        assert_same(grads, gradients(reference, batch))
        phb.get_balancer(model).step()
        phb.get_balancer(reference).step()
    assert_same(phb.get_balancer(model).state_dict(), phb.get_balancer(reference).state_dict())


def test_replicas_of_data_parallel_are_refused():
    model = priced()
    model.model._is_replica = True  # as torch.nn.parallel.replicate marks the copies that its threads run
    with pytest.raises(RuntimeError, match=r"DataParallel.*(torchrun|DistributedDataParallel|one GPU)"):
        model(**tiny_batch(model))
