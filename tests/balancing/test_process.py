"""What a patch sets in the process, beyond its model: nothing of it is left once the last patched model is gone."""

import gc

import pytest
import torch
import transformers
from peft import PeftModel
from tiny import tiny_batch, tiny_model
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import hf_phibalance as phb
from hf_phibalance.balancing import process


pytestmark = pytest.mark.slow


def footprint():
    """All that may be changed in classes and settings of others."""
    owners = {
        torch.amp.GradScaler: ("scale", "update"),
        transformers.Trainer: ("train",),
        transformers.PreTrainedModel: ("save_pretrained", "from_pretrained"),
        PeftModel: ("save_pretrained", "load_adapter"),
        torch.nn.Module: ("__call__", "forward", "state_dict", "load_state_dict"),
        torch.optim.Optimizer: ("step", "zero_grad"),
    }
    methods = [vars(owner).get(name) for owner, names in owners.items() for name in names]
    hooks = [dict(table) for table in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)]
    stacks = torch.overrides._get_current_function_mode_stack(), torch._C._len_torch_dispatch_stack()
    return methods, hooks, stacks, torch._dynamo.config.skip_nnmodule_hook_guards


@pytest.fixture
def before():
    """Without patched models of other tests."""
    gc.collect()
    for balancer in process.balancers():  # whose model the traceback of a test still holds, for instance
        phb.unpatch(balancer.root)
    phb.unpatch(phb.patch(tiny_model("mixtral")))
    return footprint()


def used(model):
    model.train()
    torch.amp.GradScaler("cpu").scale(model(**tiny_batch(model)).loss).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model


def test_nothing_is_left_when_the_last_model_is_unpatched(before):
    first, second = (used(phb.patch(tiny_model("mixtral"), {"bias_coef": 0.1})) for _ in range(2))
    during = footprint()
    assert during[0] != before[0] and during[1] != before[1]
    phb.unpatch(first)
    assert footprint() == during  # the other one still needs it
    phb.unpatch(second)
    assert footprint() == before


def test_who_has_wrapped_a_method_since_keeps_it(before, monkeypatch):
    model = phb.patch(tiny_model("mixtral"))
    ours = transformers.Trainer.train

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", theirs)
    phb.unpatch(model)
    assert transformers.Trainer.train is theirs
    model = phb.patch(tiny_model("mixtral"))
    phb.unpatch(model)
    assert transformers.Trainer.train is theirs
    monkeypatch.undo()
    transformers.Trainer.train = before[0][2]
    assert footprint() == before


def test_other_models_of_the_same_config_are_untouched():
    config = tiny_model("mixtral", router_aux_loss_coef=0.5, output_router_logits=True).config
    written = config.to_dict()
    model, other = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = other(**batch).loss
        phb.patch(model, {"coef": 0.5})
        assert torch.equal(other(**batch).loss, expected)
    assert config.to_dict() == written and other.config is config and model.config is not config
    assert all(getattr(module, "config", model.config) is not config for module in model.modules())
    assert model.config.router_aux_loss_coef == 0 and model.config.phi_balance["coef"] == 0.5
    phb.unpatch(model)
    assert model.config.to_dict() == written
