"""What φ-balancing costs: step time and memory against the unpatched model and against the built-in auxiliary loss.

    python recipes/benchmarks/overhead.py                                   # the shape of the README's table
    python recipes/benchmarks/overhead.py --num_experts 128 --tokens 1024 --rounds 40 --json overhead.json

A step is forward, backward and, where patched, `begin_step` and `step` of the balancer; no optimizer, which would only
dilute the differences. All methods take turns on the same model and batch, in an order that changes from round to
round, and each is compared with the unpatched step of the same round; the table gives the median ratio and the middle
half of the ratios. On a CPU the time is that of the process, not of the wall, since other processes come and go; on a
GPU it is measured by events. Memory is what autograd keeps for the backward pass, counted tensor by tensor, and on a
GPU the allocator's peak as well.
"""

import argparse
import json
import platform
import random
import statistics
import time

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


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        args.model_type,
        vocab_size=1024,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128,
        head_dim=64,
        intermediate_size=args.expert_size,
        moe_intermediate_size=args.expert_size,
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
    step(model, batch, method)  # the first step after patching also checks the set-up, once
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
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the numbers of every round")
    args = parser.parse_args()

    model, batch = build(args)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    memory, peak = {}, {}
    order = list(METHODS)
    for index in track(range(args.rounds + 2), description="interleaved rounds"):
        random.Random(index).shuffle(order)
        for name in order:
            method = METHODS[name]
            if isinstance(method, phb.PhiBalanceConfig):
                phb.patch(model, method)
            if index == 0:
                memory[name] = kept_bytes(model, batch, method)
            elif index == 1:
                if batch["input_ids"].is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                step(model, batch, method)
                peak[name] = torch.cuda.max_memory_allocated() if batch["input_ids"].is_cuda else 0
            else:
                times[name].append(seconds(model, batch, method))
            phb.unpatch(model)

    table = Table(title=f"{args.model_type}, {args.tokens} tokens, {args.num_experts} experts, top-{args.top_k}")
    for column in (
        "method",
        "step [ms]",
        "ratio: median",
        "middle half",
        "kept for backward [MiB]",
        "more [KiB/layer]",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["unpatched"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name,
            f"{1e3 * statistics.median(values):.1f}",
            f"{middle:.4f}",
            f"{low:.4f} to {high:.4f}",
            f"{memory[name] / 2**20:.1f}" + (f" (peak {peak[name] / 2**20:.0f})" if peak[name] else ""),
            f"{(memory[name] - memory['unpatched']) / 2**10 / args.num_layers:.0f}",
        )
    console = Console()
    console.print(table)
    logits = args.tokens * args.num_experts * getattr(torch, args.dtype).itemsize / 2**10
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    console.print(
        f"one logits tensor: {logits:.0f} KiB; {args.rounds} rounds; {device}; torch {torch.__version__}; transformers {transformers.__version__}"
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"arguments": vars(args), "seconds": times, "kept_bytes": memory, "peak_bytes": peak}, file, indent=1
            )


if __name__ == "__main__":
    main()
