"""The plugin for vLLM without vLLM: its choice of experts, its entry point, its refusals. With vLLM: `test_vllm`."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from tiny import MODEL_TYPES, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.integrations import vllm


def routed(model, batch):
    """By layer: the logits of the router, recomputed from its weight, and the dense weights `(T, E)` that its experts get."""
    seen = {}

    def note(site):
        def hook(module, args, kwargs):
            hidden, *rest = (part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor))
            ids = next(part for part in rest if not part.is_floating_point())
            weights = next(part for part in rest if part.is_floating_point())
            linear = next(m for m in site.router.modules() if getattr(m, "weight", None) is not None)
            logits = torch.nn.functional.linear(
                hidden.reshape(-1, hidden.shape[-1]), linear.weight, getattr(linear, "bias", None)
            )
            weights = weights if weights.shape == ids.shape else weights.gather(-1, ids)
            seen[site.name] = logits, torch.zeros_like(logits).scatter(-1, ids.long(), weights.to(logits))

        return hook

    sites = phb.get_balancer(model).sites
    handles = [site.parent.experts.register_forward_pre_hook(note(site), with_kwargs=True) for site in sites]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    assert seen.keys() == {site.name for site in sites}
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in vllm.RANKED if family in MODEL_TYPES])
def test_it_chooses_and_weighs_as_the_patched_model(family):
    model = phb.patch(tiny_model(family), {"coef": 0.0})
    if not all(hasattr(site.parent, "experts") for site in phb.get_balancer(model).sites):
        pytest.skip("an old transformers, whose block hands its choice to no module")
    batch = {"input_ids": tiny_batch(model, batch=4, seq=16, padded=False)["input_ids"]}
    plain = routed(model, batch)
    balancer = phb.get_balancer(model)
    spread = 1.0 if vllm.RANKED[family] == "probs" else 10.0
    torch.manual_seed(0)
    balancer.set_biases({site.name: spread * (torch.rand(site.num_experts) - 0.5) for site in balancer.sites})
    biased = routed(model, batch)
    for name, (logits, expected) in biased.items():
        choice = vllm.BiasedChoice(vllm.RANKED[family])
        choice.bias = balancer.biases()[name]
        top_k = int((expected > 0).sum(-1).max())
        renormalize = bool(torch.allclose(expected.sum(-1), torch.ones(len(expected))))
        weights, chosen = choice(None, logits, top_k, renormalize)
        torch.testing.assert_close(
            torch.zeros_like(logits).scatter(-1, chosen, weights), expected, rtol=1e-4, atol=1e-6
        )
    first = balancer.sites[0].name  # which still sees the same tokens
    changed = ((plain[first][1] > 0) != (biased[first][1] > 0)).any(-1).float().mean()
    assert changed > 0.5, "the bias is too small for the comparison to say anything"


def test_vllm_finds_the_plugin_and_its_import_is_light():
    (plugin,) = entry_points(group="vllm.general_plugins", name="phi_balance")
    assert plugin.load() is vllm.register
    code = (
        "import sys, hf_phibalance.integrations.vllm\n"
        "assert not {'torch', 'transformers', 'vllm', 'safetensors'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"use_grouped_topk": True, "num_expert_group": 8}, "num_expert_group=8"),
        ({"custom_routing_function": print}, "custom_routing_function="),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        ({"hash_indices_table": torch.zeros(8)}, "hash_indices_table='Tensor'"),
        ({"num_fused_shared_experts": 1}, "num_fused_shared_experts=1"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_rules_that_it_cannot_add_to_are_refused(options, named):
    vllm.refuse_other_rules({"scoring_func": "softmax", "use_grouped_topk": True, "num_expert_group": 1})
    with pytest.raises(ValueError, match=rf"{named}.*`phibalance export`"):
        vllm.refuse_other_rules(options)
