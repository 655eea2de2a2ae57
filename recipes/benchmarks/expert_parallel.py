"""
The time of a training step of MoE layers under expert parallelism, by the loads of the experts.

    python recipes/benchmarks/expert_parallel.py                      # writes expert_parallel.json beside this script
    python recipes/benchmarks/expert_parallel.py --ranks 2 --rounds 5 --output -

Each rank is a process (gloo) that holds E / R experts of each layer and its own tokens. A layer sends tokens to the ranks of their
experts and back by all-to-all, forward and backward. There is no attention and no optimizer, which take equally long at all loads. Tokens
choose experts at random with given loads: even ones, those that a method left in the committed runs of `compare/main.yaml` (Mixtral,
mixed stream, seed 0), or collapsed onto the first top-k experts.

All loads take turns in every round, in a random order. Two figures are compared with those of even loads in the same round:

- `wall`: the time from the start of all ranks to the end of the last. It means something only if each rank has a core of its own.
- `path`: the critical path. All-to-alls cut a step into sections, and in each section all ranks wait for the slowest. So the path is the
  sum over sections of the longest CPU time of a rank. It does not depend on how many cores the ranks share.

Shapes: T tokens of a rank, H hidden, k experts per token, E experts, R ranks, L layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from invariance import in_ranks
from torch import Tensor, nn

from hf_phibalance.files import replace_unprintable
from hf_phibalance.maths import busiest_rank


HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from compare.harness import KEEP_MEMORY, Results, load_plans  # noqa: E402, recipes/ is on the path now


EVEN, COLLAPSED = "even", "collapsed"
MODEL, STREAM, SEED, PLAN = "mixtral", "mixed", 0, "methods"
METHODS = ("none", "Switch", "φ price, paper", "φ price and bias 0.003")
TOP_K = 2
CLOCKS = ("wall", "path")


# ---------------------------------------------------------------------- loads


def method_loads() -> dict[str, Tensor]:
    """Returns the shares of the assignments on held-out text `(L, E)` that each of `METHODS` left."""
    folder = HERE.parent / "compare"
    _, plans = load_plans(folder / "main.yaml")
    plan = next(plan for plan in plans if plan.name == PLAN)
    results = Results(folder / "results" / "main.jsonl")
    methods = [method for method in plan.methods if method.label in METHODS]
    records = {method.label: results.get(plan.run(method, (MODEL, STREAM), SEED)) for method in methods}
    return {name: torch.tensor(record["experts"], dtype=torch.float64).mean(1) for name, record in records.items()}


def all_loads() -> dict[str, Tensor]:
    measured = method_loads()
    even_LE = torch.full_like(next(iter(measured.values())), 1.0)
    collapsed_LE = torch.zeros_like(even_LE)
    collapsed_LE[:, :TOP_K] = 1.0
    loads = {EVEN: even_LE, **measured, COLLAPSED: collapsed_LE}
    return {name: load_LE / load_LE.sum(-1, keepdim=True) for name, load_LE in loads.items()}


def draw_choices(share_E: Tensor, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """
    Draws `top_k` different experts for each token, `(T, k)`, each with probability `top_k` x its share (systematic sampling). No share
    may exceed `1 / top_k`.
    """
    edges_E = (share_E * top_k).cumsum(-1)
    edges_E[-1] = top_k
    points_Tk = torch.rand(tokens, 1, generator=generator, dtype=torch.float64) + torch.arange(top_k)
    return torch.searchsorted(edges_E, points_Tk, right=True)


# ---------------------------------------------------------------------- a step


class Sections:
    """CPU time of this process in each section of a step. An all-to-all ends a section and starts another."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.process_time()

    def cut(self) -> None:
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now


class Exchange(torch.autograd.Function):
    """All-to-all of rows. `sent` and `received` are numbers of rows by rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], sections: Sections) -> Tensor:
        ctx.splits = sent, received, sections
        return exchange(rows, sent, received, sections)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        sent, received, sections = ctx.splits
        return exchange(gradient, received, sent, sections), None, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], sections: Sections) -> Tensor:
    sections.cut()
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent)
    sections.cut()
    return result


class ExpertParallelLayer(nn.Module):
    """The experts of one layer that this rank holds. `gate_up (E / R, 2 S, H)` and `down (E / R, H, S)`, S the size of an expert."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    def forward(self, hidden_TH: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor, sections: Sections) -> Tensor:
        ranks, own = dist.get_world_size(), len(self.down)
        order = chosen_Tk.reshape(-1).argsort(stable=True)  # by expert, so by rank
        token = order // chosen_Tk.shape[1]
        sent_RE = torch.bincount(chosen_Tk.reshape(-1), minlength=ranks * own).view(ranks, own)
        received_RE = exchange(sent_RE, [1] * ranks, [1] * ranks, sections)
        sent, received = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
        rows = Exchange.apply(hidden_TH[token], sent, received, sections)
        expert = torch.arange(own).repeat(ranks).repeat_interleave(received_RE.reshape(-1))
        by_expert = expert.argsort(stable=True)
        parts = rows[by_expert].split(received_RE.sum(0).tolist())
        out = torch.cat([self.expert(index, part) for index, part in enumerate(parts)])
        back = Exchange.apply(out[by_expert.argsort()], received, sent, sections)
        return hidden_TH.index_add(0, token, back * weights_Tk.reshape(-1)[order, None])

    def expert(self, index: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate_up[index]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[index])


def step(layers: nn.ModuleList, hidden_TH: Tensor, chosen_LTk: Tensor) -> tuple[Tensor, list[float]]:
    """Forward and backward. Returns the output, and the CPU time of each section."""
    weights_Tk = torch.full(chosen_LTk.shape[1:], 1.0 / chosen_LTk.shape[-1])
    sections, out = Sections(), hidden_TH
    for layer, chosen_Tk in zip(layers, chosen_LTk):
        out = layer(out, chosen_Tk, weights_Tk, sections)
    out.square().mean().backward()
    sections.cut()
    return out, sections.seconds


# ---------------------------------------------------------------------- ranks


def run_rank(args: argparse.Namespace, loads: dict[str, list[list[float]]]) -> tuple[list[dict], dict[str, list]]:
    """
    Takes `args.rounds` steps at each of the loads, shares `(L, E)`, on this rank. Returns the wall time and the sections' CPU time by round and
    load, and this rank's assignments `(L, E)` by load.
    """
    rank, ranks, generator = dist.get_rank(), dist.get_world_size(), torch.Generator().manual_seed(dist.get_rank())
    shares = {name: torch.tensor(share_LE, dtype=torch.float64) for name, share_LE in loads.items()}
    number, experts = shares[EVEN].shape
    layers = nn.ModuleList(make_layer(index, rank, ranks, experts, args) for index in range(number))
    hidden_TH = torch.randn(args.tokens, args.hidden_size, generator=generator, requires_grad=True)
    chosen = {
        name: torch.stack([draw_choices(share_E, args.tokens, TOP_K, generator) for share_E in share_LE])
        for name, share_LE in shares.items()
    }
    names, found = list(loads), []
    for turn in range(args.rounds + 1):
        times = {}
        for name in random.Random(turn).sample(names, len(names)):  # the same order on all ranks
            dist.barrier()
            start = time.perf_counter()
            _, sections = step(layers, hidden_TH, chosen[name])
            dist.barrier()
            times[name] = {"wall": time.perf_counter() - start, "sections": sections}
            layers.zero_grad()
            hidden_TH.grad = None
        found.append(times)
    counts = {
        name: [torch.bincount(chosen_Tk.reshape(-1), minlength=experts).tolist() for chosen_Tk in chosen_LTk]
        for name, chosen_LTk in chosen.items()
    }
    return found[1:], counts  # the first round warms up


def make_layer(index: int, rank: int, ranks: int, experts: int, args: argparse.Namespace) -> ExpertParallelLayer:
    """Returns the experts of layer number `index` that `rank` holds. All ranks together have the same experts for any number of ranks."""
    generator = torch.Generator().manual_seed(index)
    gate_up = 0.05 * torch.randn(experts, 2 * args.expert_size, args.hidden_size, generator=generator)
    down = 0.05 * torch.randn(experts, args.hidden_size, args.expert_size, generator=generator)
    return ExpertParallelLayer(*(part.chunk(ranks)[rank].clone() for part in (gate_up, down)))


def measure(ranks: int, args: argparse.Namespace, loads: dict[str, Tensor]) -> dict[str, Any]:
    """
    Returns for each load the share of the busiest rank over the mean, and of `wall` and `path` over those of even loads the quartiles over
    rounds; and the medians at even loads in milliseconds.
    """
    by_rank = in_ranks(run_rank, ranks, args, {name: load_LE.tolist() for name, load_LE in loads.items()})
    rounds = [
        {
            name: {
                "wall": everyone[0][name]["wall"],
                "path": sum(map(max, zip(*(one[name]["sections"] for one in everyone)))),
            }
            for name in loads
        }
        for everyone in zip(*(times for times, _ in by_rank))
    ]
    result: dict[str, Any] = {}
    for name in loads:
        count_LE = torch.tensor([counts[name] for _, counts in by_rank]).sum(0).double()
        result[name] = {"share": round(float(busiest_rank(count_LE, ranks).mean()), 4)}
        for clock in CLOCKS:
            ratios = [times[name][clock] / times[EVEN][clock] for times in rounds]
            result[name][clock] = [round(value, 4) for value in statistics.quantiles(ratios, n=4)]
    even = {clock: round(statistics.median(1e3 * times[EVEN][clock] for times in rounds), 1) for clock in CLOCKS}
    return {"loads": result, "even_ms": even}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=12, help="at least 2")
    parser.add_argument("--tokens", type=int, default=512, help="of a rank")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--expert_size", type=int, default=512)
    parser.add_argument("--output", default=str(HERE / "expert_parallel.json"), help="file, or - for standard output")
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}.")
    os.environ.update(KEEP_MEMORY | {"OMP_NUM_THREADS": "1"})
    loads = all_loads()
    shape = {name: getattr(args, name) for name in ("rounds", "tokens", "hidden_size", "expert_size")}
    layers, experts = loads[EVEN].shape
    if uneven := [ranks for ranks in args.ranks if experts % ranks]:
        parser.error(f"--ranks must divide the {experts} experts, got {uneven[0]}.")
    found = {
        "settings": {
            **shape,
            "layers": layers,
            "experts": experts,
            "top_k": TOP_K,
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "ranks": {str(ranks): measure(ranks, args, loads) for ranks in args.ranks},
    }
    text = json.dumps(found, indent=1) + "\n"
    if args.output == "-":
        print(text, end="")
    else:
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    replace_unprintable()
    main()
