"""The benchmark of expert parallelism: its layers compute what one process computes, and its choices have the loads that were asked for."""

import argparse
import json

import expert_parallel
import pytest
import torch
import torch.distributed as dist
from invariance import in_ranks
from torch import nn


pytestmark = pytest.mark.slow

ARGS = argparse.Namespace(rounds=2, tokens=24, hidden_size=16, expert_size=8)
EXPERTS, LAYERS = 8, 2


def tokens_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    hidden = torch.randn(ARGS.tokens, ARGS.hidden_size, generator=generator)
    share = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0.0, 0.0], dtype=torch.float64)
    return hidden, torch.stack([expert_parallel.draw_choices(share, ARGS.tokens, 2, generator) for _ in range(LAYERS)])


def layers_of(rank, ranks):
    return nn.ModuleList(expert_parallel.make_layer(index, rank, ranks, EXPERTS, ARGS) for index in range(LAYERS))


def step_on_this_rank():
    """Returns the output, its gradients, and the number of sections."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layers, (hidden, chosen) = layers_of(rank, ranks), tokens_of(rank)
    hidden.requires_grad_(True)
    out, sections = expert_parallel.step(layers, hidden, chosen)
    gradients = [parameter.grad.numpy() for parameter in layers.parameters()]
    return out.detach().numpy(), hidden.grad.numpy(), gradients, len(sections)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_that_of_one_process(ranks):
    """Outputs, and gradients of tokens and experts, against a loop over tokens."""
    found = in_ranks(step_on_this_rank, ranks)
    whole = layers_of(0, 1)
    losses, outputs, inputs = [], [], []
    for rank in range(ranks):
        hidden, chosen = tokens_of(rank)
        out = hidden.requires_grad_(True)
        for layer, chosen_Tk in zip(whole, chosen):
            rows = []
            for token, experts in enumerate(chosen_Tk.tolist()):
                rows.append(out[token] + sum(layer.expert(expert, out[token][None])[0] for expert in experts) / 2)
            out = torch.stack(rows)
        losses.append(out.square().mean())
        outputs.append(out.detach())
        inputs.append(hidden)
    sum(losses).backward()
    for rank, (out, gradient, _, _) in enumerate(found):
        torch.testing.assert_close(torch.tensor(out), outputs[rank], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(gradient), inputs[rank].grad, rtol=1e-4, atol=1e-6)
    for index, parameter in enumerate(whole.parameters()):
        together = torch.cat([torch.tensor(gradients[index]) for _, _, gradients, _ in found])
        torch.testing.assert_close(together, parameter.grad, rtol=1e-4, atol=1e-6)
    assert {sections for *_, sections in found} == {2 * LAYERS * (3 + 2) + 1}  # all-to-alls: 3 forward, 2 backward


def test_choices_have_their_loads():
    share = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0], dtype=torch.float64)
    chosen = expert_parallel.draw_choices(share, 20_000, 2, torch.Generator().manual_seed(0))
    assert (chosen[:, 0] != chosen[:, 1]).all() and chosen.max() <= 4
    loads = torch.bincount(chosen.reshape(-1), minlength=5) / chosen.numel()
    torch.testing.assert_close(loads.double(), share, rtol=0, atol=0.005)
    assert loads[0] == 0.5 and loads[4] == 0


def test_command(capsys):
    """It measures the loads of the committed runs. At collapsed loads, one rank does all the work."""
    sizes = ["--tokens", "16", "--hidden_size", "16", "--expert_size", "16"]
    expert_parallel.main(["--ranks", "2", "--rounds", "2", *sizes, "--output", "-"])
    found = json.loads(capsys.readouterr().out)["ranks"]["2"]["loads"]
    assert list(found) == ["even", *expert_parallel.METHODS, "collapsed"]
    assert found["collapsed"]["share"] == 2.0 and found["even"]["path"] == [1.0, 1.0, 1.0]
    assert 1 <= found["even"]["share"] < found["none"]["share"] < 2
