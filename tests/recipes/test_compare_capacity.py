"""Experts of limited capacity in recipes/compare, against naive loops."""

import math

import pytest
import torch
from comparison import capacity, harness, models, small_run
from torch import nn

import hf_phibalance as phb


def naive_fits(chosen, weights, num_experts, factor):
    """Expert by expert, the assignments of the highest weight."""
    most = math.ceil(factor * len(chosen) * len(chosen[0]) / num_experts)
    fits = [[False] * len(chosen[0]) for _ in chosen]
    for expert in range(num_experts):
        own = [(-weights[t][i], t, i) for t, row in enumerate(chosen) for i, e in enumerate(row) if e == expert]
        for _, t, i in sorted(own)[:most]:
            fits[t][i] = True
    return fits


@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0, 1.25, 4.0])
def test_an_expert_takes_the_assignments_of_the_highest_weight(factor):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(37, 8, generator=generator) + torch.arange(8.0) / 3
    weights, chosen = scores.softmax(-1).topk(3)
    fits = capacity.within_capacity(chosen, weights, 8, factor)
    assert fits.tolist() == naive_fits(chosen.tolist(), weights.tolist(), 8, factor)
    assert fits.all() == (factor == 4.0)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_limited_block_leaves_dropped_assignments_out(model_type):
    """Its output and the router's gradient, against a block whose experts are called one by one."""
    model = models.build_model(model_type, 50, seed=0, num_hidden_layers=1)
    (site,) = phb.routers.find_routers(model)
    block, hidden = site.parent, torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(1))
    _, weights, chosen = block.gate(hidden.view(24, 64) if model_type == "mixtral" else hidden)
    fits = torch.tensor(naive_fits(chosen.tolist(), weights.tolist(), site.num_experts, 1.0))
    assert 0 < int((~fits).sum()) < fits.numel()
    with capacity.limited(model, 1.0) as counted:
        found = block(hidden).view(24, 64)
    assert counted == [fits.numel(), int((~fits).sum())]
    expected = block.shared_experts(hidden).view(24, 64) if model_type == "deepseek_v3" else torch.zeros(24, 64)
    for token in range(24):
        for choice in range(site.top_k):
            if fits[token, choice]:
                up = block.experts.gate_up_proj[chosen[token, choice]] @ hidden[0, token]
                gate, up = up.chunk(2)
                out = block.experts.down_proj[chosen[token, choice]] @ (nn.functional.silu(gate) * up)
                expected = expected.index_add(0, torch.tensor([token]), (weights[token, choice] * out)[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), block.gate.weight)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    with capacity.limited(model, 0.0) as counted:
        block(hidden)
    assert counted == [0, 0]
    torch.testing.assert_close(block(hidden), block(hidden))
    assert not torch.allclose(block(hidden).view(24, 64), found)


def test_the_loss_is_that_of_all_windows_in_mixed_batches():
    run = small_run()
    model = models.build_model("mixtral", 60, 0, **run.model_fields)
    phb.patch(model, phb.PhiBalanceConfig(method="none"))
    generator = torch.Generator().manual_seed(0)
    validation = {name: torch.randint(0, 60, (4, 16), generator=generator) for name in ("a", "b", "c")}
    balancer = phb.get_balancer(model)
    figures, halves = capacity.examine_capacity(model, balancer, validation, rows=5, factors=[0.5, 8.0])
    mixed = torch.stack([validation[name][window] for window in range(4) for name in validation])
    with torch.no_grad(), capacity.limited(model.eval(), 0.5) as counted:
        losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in mixed.split(5)]
    assert figures["loss_at_0.5"] == pytest.approx(sum(losses) / 12)
    assert figures["dropped_at_0.5"] == counted[1] / counted[0] >= 0.5 > figures["dropped_at_8"] == 0
    assert figures["loss_at_8"] == pytest.approx(model(input_ids=mixed, labels=mixed).loss.item(), rel=1e-5)
    halves = torch.tensor(halves)
    assert halves.shape == (2, 2, 8) and (halves.sum(-1) == 12 * 16 * 2 // 2).all()


def test_a_run_keeps_its_key_without_a_limit():
    """Finished runs are found again by their settings, which a limit changes."""
    plain, limited = small_run(), small_run(capacity=1.25)
    settings = {name: value for name, value in plain.settings.items() if not name.startswith("capacit")}
    assert plain.key != limited.key and harness.key_of(settings) == plain.key
