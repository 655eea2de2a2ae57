"""Every method in two real ranks: gradients averaged over them, and biases, are those of the formula over both."""

import pytest
import torch
import torch.distributed as dist
from charging import COEF, collect
from invariance import in_ranks
from references import forward, global_batch_loss, phi_loss, pooled_loss, sequence_loss, switch_loss, z_loss
from steps import SHAPES, assert_gradient, build, difference, micro_batches, step_gradient
from tiny import set_prices

import hf_phibalance as phb


pytestmark = pytest.mark.slow


ON_RANKS = {
    "switch": ({"method": "switch", "coef": COEF}, switch_loss),
    "pooled": ({"method": "pooled", "coef": COEF}, pooled_loss),
    "global_batch": ({"method": "global_batch", "coef": COEF}, global_batch_loss),
    "phi_current": ({"coef": COEF, "price_from": "current"}, "current"),
    "phi_global": ({"coef": COEF, "price_from": "global"}, "global"),
    "z_loss": ({"method": "none", "z_loss_coef": 0.1}, z_loss),
    "sequence": ({"method": "none", "sequence_coef": 2.0}, sequence_loss),
    "loss_free": ({"method": "loss_free", "bias_coef": 0.01}, None),
    "quantile": ({"method": "quantile"}, None),
}
COUNTED_OVER_RANKS = ("global_batch", "phi_global")


def batches_of_rank(model, rank):
    return micro_batches(model, SHAPES[:2] if rank == 0 else SHAPES[1:], seed=50 * rank)


def on_each_rank():
    results = {}
    for case, (config, _) in ON_RANKS.items():
        for checkpointing in ("none", "reentrant") if case in COUNTED_OVER_RANKS else ("none",):
            model = build("mixtral", checkpointing)
            batches = batches_of_rank(model, dist.get_rank())
            plain = step_gradient(model, batches)
            phb.patch(model, config)
            if case.startswith("phi"):
                set_prices(model)
            added = difference(step_gradient(model, batches), plain)
            for grad in added.values():
                dist.all_reduce(grad)
            results[f"{case}_{checkpointing}"] = {
                "gradient": {name: (grad / dist.get_world_size()).numpy() for name, grad in added.items()},
                "biases": {name: bias.numpy() for name, bias in phb.get_balancer(model).biases().items()},
            }
    return results


def test_two_ranks():
    """Gradients averaged over the ranks, and biases, are those of the formula over both ranks."""
    by_rank = in_ranks(on_each_rank, 2)
    model = build("mixtral")
    by_turn = list(zip(batches_of_rank(model, 0), batches_of_rank(model, 1)))
    everything = [batch for turn in by_turn for batch in turn]
    means = phb.get_balancer(phb.patch(model)).means()
    means = set_prices(model).means()
    phb.unpatch(model)
    for case, (config, loss) in ON_RANKS.items():
        keys = [f"{case}_{mode}" for mode in ("none", "reentrant") if f"{case}_{mode}" in by_rank[0]]
        if loss is None:
            balancer = phb.get_balancer(phb.patch(model, config))
            step_gradient(model, everything)
            for results in by_rank:
                for name, bias in balancer.biases().items():
                    assert bias.abs().max() > 1e-3
                    torch.testing.assert_close(
                        torch.from_numpy(results[keys[0]]["biases"][name]), bias, atol=2e-5, rtol=0
                    )
            phb.unpatch(model)
            continue
        formula = phi_loss(means, loss) if isinstance(loss, str) else loss
        expected = loss_gradient_of_turns(model, by_turn, config, formula, case in COUNTED_OVER_RANKS)
        for key in keys:
            for results in by_rank:
                gradient = {name: torch.from_numpy(grad) for name, grad in results[key]["gradient"].items()}
                assert_gradient(gradient, expected)


def loss_gradient_of_turns(model, by_turn, config, formula, over_ranks):
    """As `loss_gradient`, for micro-batches that the ranks run side by side."""
    coef = next(value for name, value in config.items() if name.endswith("coef"))
    model.zero_grad()
    turns = [[forward(model, batch)[1] for batch in turn] for turn in by_turn]
    tokens = sum(int(next(iter(r.values())).mask.sum()) for turn in turns for r in turn)
    total = 0.0
    for j, turn in enumerate(turns):
        for own in turn:
            others = [r for earlier in turns[:j] for r in earlier] + [r for r in turn if r is not own]
            so_far = [*(others if over_ranks else []), own]
            total = total + int(next(iter(own.values())).mask.sum()) / tokens * coef * formula(so_far)
    total.backward()
    return collect(model)
