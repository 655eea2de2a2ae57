"""What φ-balancing costs: step time and memory against the unpatched model and against the built-in auxiliary loss.

    python recipes/benchmarks/overhead.py                                   # the shape of the README's table
    python recipes/benchmarks/overhead.py --num_experts 128 --tokens 1024 --rounds 40 --json overhead.json

A step is forward, backward and, where patched, `begin_step` and `step` of the balancer; no optimizer, which would only
dilute the differences. All methods take turns on the same model and batch, in an order that changes from round to
round, and each is compared with the unpatched step of the same round.

A step of the whole model varies by several per cent, which is more than any of the methods costs. What a method adds
depends only on the number of layers, tokens and experts, so it is also measured on a model with the same routers and a
light body, where it is not lost in the noise, and given in milliseconds and as a share of the step of the whole model.

On a CPU the time is that of the process, not of the wall, since other processes come and go; on a GPU it is measured
by events. Memory is what autograd keeps for the backward pass, counted tensor by tensor, and on a GPU the allocator's
peak as well.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import hf_phibalance as phb


METHODS = {
    "unpatched": None,
    "price gradient": phb.PhiBalanceConfig(coef=0.01),
    "dual bias": phb.PhiBalanceConfig(coef=0.0, bias_coef=0.001),
    "gradient and bias": phb.PhiBalanceConfig(coef=0.01, bias_coef=0.001),
    "built-in aux loss": "built-in",
}
LIGHT_HIDDEN_SIZE, LIGHT_EXPERT_SIZE = 128, 8


def build(
    args: argparse.Namespace, hidden_size: int, expert_size: int
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        args.model_type,
        vocab_size=1024,
        hidden_size=hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        intermediate_size=expert_size,
        moe_intermediate_size=expert_size,
        num_experts=args.num_experts,
        num_local_experts=args.num_experts,
        num_experts_per_tok=args.top_k,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device).train()
    model.router_aux_loss_coef = 0.001
    ids = torch.randint(0, 1024, (args.batch_size, args.tokens // args.batch_size), device=args.device)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], method: object) -> None:
    if isinstance(method, phb.PhiBalanceConfig):
        balancer = phb.get_balancer(model)
        balancer.begin_step([batch])
        model(**batch).loss.backward()
        balancer.step()
    else:
        model(**batch, output_router_logits=method == "built-in").loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def seconds(model: torch.nn.Module, batch: dict[str, torch.Tensor], method: object) -> float:
    for _ in range(2):  # the first step after patching checks the set-up, the second what the prices reach, both once
        step(model, batch, method)
    if batch["input_ids"].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(model, batch, method)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    step(model, batch, method)
    return time.process_time() - begin


def kept_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor], method: object) -> int:
    """Bytes of distinct storages, parameters aside, that autograd holds between forward and backward."""
    held = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, batch, method)
    return sum(held.values())


def measure(model: torch.nn.Module, batch: dict[str, torch.Tensor], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of a step by method, in `rounds` rounds in which all methods take turns."""
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    order = list(METHODS)
    for index in track(range(rounds), description=title):
        random.Random(index).shuffle(order)
        for name in order:
            with patched(model, METHODS[name]):
                times[name].append(seconds(model, batch, METHODS[name]))
    return times


@contextmanager
def patched(model: torch.nn.Module, method: object) -> Iterator[None]:
    if isinstance(method, phb.PhiBalanceConfig):
        phb.patch(model, method)
    try:
        yield
    finally:
        phb.unpatch(model)


def paired(times: dict[str, list[float]], name: str, compare: Callable[[float, float], float]) -> list[float]:
    """Lower quartile, median and upper quartile of `compare(step, unpatched step of the same round)`."""
    return statistics.quantiles([compare(*pair) for pair in zip(times[name], times["unpatched"])], n=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_type", default="qwen3_moe")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_experts", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--expert_size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--light_rounds", type=int, default=200, help="rounds of the model with a light body")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the numbers of every round")
    args = parser.parse_args()

    model, batch = build(args, args.hidden_size, args.expert_size)
    memory, peak = {}, {}
    for name, method in METHODS.items():
        with patched(model, method):
            memory[name] = kept_bytes(model, batch, method)
            if batch["input_ids"].is_cuda:
                torch.cuda.reset_peak_memory_stats()
                step(model, batch, method)
                peak[name] = torch.cuda.max_memory_allocated()
    whole = measure(model, batch, args.rounds, "whole model")
    del model
    light = measure(*build(args, LIGHT_HIDDEN_SIZE, LIGHT_EXPERT_SIZE), args.light_rounds, "light body")

    unpatched = statistics.median(whole["unpatched"])
    table = Table(title=f"{args.model_type}, {args.tokens} tokens, {args.num_experts} experts, top-{args.top_k}")
    for column in (
        "method",
        "step [ms]",
        "ratio, paired",
        "adds [ms]",
        "ratio, from what it adds",
        "keeps [KiB/layer]",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in METHODS:
        low, ratio, high = paired(whole, name, lambda step, base: step / base)
        less, added, more = paired(light, name, lambda step, base: step - base)
        table.add_row(
            name,
            f"{1e3 * statistics.median(whole[name]):.1f}",
            f"{ratio:.4f} ({low:.4f} to {high:.4f})",
            f"{1e3 * added:.2f} ({1e3 * less:.2f} to {1e3 * more:.2f})",
            f"{1 + added / unpatched:.4f}",
            f"{(memory[name] - memory['unpatched']) / 2**10 / args.num_layers:.0f}"
            + (f" (peak {peak[name] / 2**20:.0f} MiB)" if peak else ""),
        )
    console = Console(width=140)
    console.print(table)
    logits = args.tokens * args.num_experts * getattr(torch, args.dtype).itemsize / 2**10
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    console.print(
        f"medians (middle half); one logits tensor: {logits:.0f} KiB; {args.rounds} and {args.light_rounds} rounds; "
        f"{device}; torch {torch.__version__}; transformers {transformers.__version__}"
    )
    if args.json:
        figures = {"seconds": whole, "light_seconds": light, "kept_bytes": memory, "peak_bytes": peak}
        Path(args.json).write_text(json.dumps({"arguments": vars(args), **figures}, indent=1))


if __name__ == "__main__":
    main()
