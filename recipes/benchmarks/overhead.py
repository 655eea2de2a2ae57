"""What balancing costs: step time and memory of every method against the unpatched model and the built-in loss.

    python recipes/benchmarks/overhead.py                                   # the shape of the README's table
    python recipes/benchmarks/overhead.py --num_experts 128 --tokens 1024 --rounds 40 --json overhead.json
    python recipes/benchmarks/overhead.py --sweep --output_dir results/overhead   # growth with experts, tokens, layers ...

A step is forward, backward and, where patched, `begin_step` and `step` of the balancer; no optimizer, which would only
dilute the differences. All methods take turns on the same model and batch, in an order that changes from round to
round, and each is compared with the unpatched step of the same round.

A step of the whole model varies by several per cent, which is more than any of the methods costs. What a method adds
depends only on the routers, so it is also measured on a model with the same routers and a light body (attention and
experts are stand-ins that pass gradients on), where it is not lost in the noise, and given in milliseconds and as a
share of the step of the whole model.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable


UNPATCHED, BUILT_IN = "unpatched", "built-in aux loss"
METHODS: dict[str, phb.PhiBalanceConfig | None] = {
    UNPATCHED: None,
    BUILT_IN: None,
    "price gradient": phb.PhiBalanceConfig(coef=0.01),
    "dual bias": phb.PhiBalanceConfig(coef=0.0, bias_coef=0.001),
    "gradient and bias": phb.PhiBalanceConfig(coef=0.01, bias_coef=0.001),
    "gradient, current price": phb.PhiBalanceConfig(coef=0.01, price_from="current"),
    "switch": phb.PhiBalanceConfig(method="switch"),
    "pooled": phb.PhiBalanceConfig(method="pooled"),
    "global batch": phb.PhiBalanceConfig(method="global_batch"),
    "loss-free": phb.PhiBalanceConfig(method="loss_free"),
    "quantile": phb.PhiBalanceConfig(method="quantile"),
    "counting only": phb.PhiBalanceConfig(method="none"),
}
MAIN = (UNPATCHED, BUILT_IN, "price gradient", "dual bias", "gradient and bias")
LIGHT_HIDDEN_SIZE, LIGHT_EXPERT_SIZE = 128, 8
WHOLE_LIMIT = 2**25  # hidden size × tokens × layers of which a CPU still runs the whole model in seconds
SWEEPS = {
    "num_experts": (8, 16, 32, 64, 128, 256),
    "top_k": (1, 2, 4, 8),
    "hidden_size": (256, 512, 1024, 2048),
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),
    "num_layers": (2, 4, 8, 16, 32, 48),
}


def build(
    args: argparse.Namespace, hidden_size: int, expert_size: int, light: bool = False
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        args.model_type,
        vocab_size=64 if light else 1024,
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
        max_position_embeddings=max(args.tokens, 2048),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device).train()
    if light:
        lighten(model)
    model.router_aux_loss_coef = 0.001
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.tokens // args.batch_size), device=args.device)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def lighten(model: torch.nn.Module) -> None:
    """Replaces attention and experts by stand-ins through which gradients flow as before."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("Attention"):
            module.forward = lambda hidden_states, *args, **kwargs: (0.5 * hidden_states, None)
        elif name.endswith("Experts"):
            module.forward = lambda hidden, chosen, weights: hidden * weights.sum(-1, keepdim=True).to(hidden.dtype)


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], balancer: phb.PhiBalancer | None, own: bool) -> None:
    """One step, balanced by `balancer` where there is one, with the built-in loss where `own`."""
    if balancer is not None:
        balancer.begin_step([batch])
        model(**batch).loss.backward()
        balancer.step()
    else:
        model(**batch, output_router_logits=own).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def stepper(model: torch.nn.Module, batch: dict[str, torch.Tensor], name: str) -> Callable[[], None]:
    """One step of a model that is patched for `name`; like a training loop, it looks for the balancer only once."""
    balancer = None if METHODS[name] is None else phb.get_balancer(model)
    return lambda: step(model, batch, balancer, own=name == BUILT_IN)


def seconds(model: torch.nn.Module, batch: dict[str, torch.Tensor], name: str) -> float:
    run = stepper(model, batch, name)
    for _ in range(2):  # the first step after patching checks the set-up, the second what the prices reach, both once
        run()
    if batch["input_ids"].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    run()
    return time.process_time() - begin


def kept_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor], name: str) -> int:
    """Bytes of distinct storages, parameters aside, that autograd holds between forward and backward."""
    held = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper(model, batch, name)()
    return sum(held.values())


def measure(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], methods: Sequence[str], rounds: int, title: str
) -> dict[str, list[float]]:
    """Seconds of a step by method, in `rounds` rounds in which all methods take turns."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for index in track(range(rounds), description=title):
        random.Random(index).shuffle(order)
        for name in order:
            with patched(model, name):
                times[name].append(seconds(model, batch, name))
    return times


@contextmanager
def patched(model: torch.nn.Module, name: str) -> Iterator[None]:
    config = METHODS[name]
    if config is not None:
        phb.patch(model, config)
    try:
        yield
    finally:
        phb.unpatch(model)


def paired(times: dict[str, list[float]], name: str, compare: Callable[[float, float], float]) -> list[float]:
    """Lower quartile, median and upper quartile of `compare(step, unpatched step of the same round)`."""
    return statistics.quantiles([compare(*pair) for pair in zip(times[name], times[UNPATCHED])], n=4)


def compare(args: argparse.Namespace, methods: Sequence[str], console: Console) -> None:
    """One shape: whole steps, what each method adds, memory."""
    model, batch = build(args, args.hidden_size, args.expert_size)
    memory, peak = {}, {}
    for name in methods:
        with patched(model, name):
            memory[name] = kept_bytes(model, batch, name)
            if batch["input_ids"].is_cuda:
                torch.cuda.reset_peak_memory_stats()
                stepper(model, batch, name)()
                peak[name] = torch.cuda.max_memory_allocated()
    whole = measure(model, batch, methods, args.rounds, "whole model")
    del model
    light = measure(*light_body(args), methods, args.light_rounds, "light body")

    unpatched = statistics.median(whole[UNPATCHED])
    table = Table(title=f"{args.model_type}, {args.tokens} tokens, {args.num_experts} experts, top-{args.top_k}")
    columns = ("step [ms]", "ratio, paired", "adds [ms]", "ratio, from what it adds", "keeps [KiB/layer]")
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for name in methods:
        low, ratio, high = paired(whole, name, lambda step, base: step / base)
        less, added, more = paired(light, name, lambda step, base: step - base)
        table.add_row(
            name,
            f"{1e3 * statistics.median(whole[name]):.1f}",
            f"{ratio:.4f} ({low:.4f} to {high:.4f})",
            f"{1e3 * added:.2f} ({1e3 * less:.2f} to {1e3 * more:.2f})",
            f"{1 + added / unpatched:.4f}",
            f"{(memory[name] - memory[UNPATCHED]) / 2**10 / args.num_layers:.0f}"
            + (f" (peak {peak[name] / 2**20:.0f} MiB)" if peak else ""),
        )
    console.print(table)
    logits = args.tokens * args.num_experts * getattr(torch, args.dtype).itemsize / 2**10
    console.print(f"one logits tensor: {logits:.0f} KiB; {args.rounds} and {args.light_rounds} rounds")
    if args.json:
        figures = {"seconds": whole, "light_seconds": light, "kept_bytes": memory, "peak_bytes": peak}
        Path(args.json).write_text(json.dumps({"arguments": vars(args), **figures}, indent=1))


def light_body(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return build(args, LIGHT_HIDDEN_SIZE, LIGHT_EXPERT_SIZE, light=True)


def sweep(args: argparse.Namespace, methods: Sequence[str], console: Console) -> None:
    """Growth of what each method adds, one factor at a time; every finished point is kept and not measured again."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    shape = (
        "model_type",
        "hidden_size",
        "num_layers",
        "num_experts",
        "top_k",
        "expert_size",
        "tokens",
        "dtype",
        "device",
    )
    points = {json.dumps(point["shape"], sort_keys=True): point for point in map(json.loads, lines)}
    for factor, values in SWEEPS.items():
        for value in values:
            at = argparse.Namespace(**(vars(args) | {factor: value}))
            own = {name: getattr(at, name) for name in shape}
            key = json.dumps(own, sort_keys=True)
            if key in points or at.top_k > at.num_experts:
                continue
            # the whole model only as the measure of a step; on a CPU, sizes that take minutes are left out
            model, batch = light_body(at)
            kept = {}
            for name in methods:
                with patched(model, name):
                    kept[name] = kept_bytes(model, batch, name)
            times = measure(model, batch, methods, args.light_rounds, f"{factor} {value}")
            points[key] = {"shape": own, "light_seconds": times, "kept_bytes": kept}
            if at.device == "cuda" or at.hidden_size * at.tokens * at.num_layers <= WHOLE_LIMIT:
                model, batch = build(at, at.hidden_size, at.expert_size)
                points[key]["step_seconds"] = statistics.median(
                    seconds(model, batch, UNPATCHED) for _ in range(args.whole_steps)
                )
            del model
            with file.open("a") as out:
                out.write(json.dumps(points[key]) + "\n")
    present(args, methods, points, shape, folder, console)


def present(
    args: argparse.Namespace,
    methods: Sequence[str],
    points: dict[str, dict[str, Any]],
    shape: Sequence[str],
    folder: Path,
    console: Console,
) -> None:
    """What each method adds to a step, and keeps per layer for the backward pass, as one table (Markdown) and one picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(4 * len(SWEEPS), 4), sharey=True, layout="constrained")
    rows = [["factor", "value", "step [ms]", *(name for name in methods if name != UNPATCHED)]]
    for axis, (factor, values) in zip(axes, SWEEPS.items()):
        curves: dict[str, list[tuple[int, float]]] = {name: [] for name in methods if name != UNPATCHED}
        for value in values:
            at = vars(args) | {factor: value}
            point = points.get(json.dumps({name: at[name] for name in shape}, sort_keys=True))
            if point is None:
                continue
            row = [factor, str(value), f"{1e3 * point['step_seconds']:.0f}" if "step_seconds" in point else "-"]
            for name, curve in curves.items():
                added = 1e3 * paired(point["light_seconds"], name, lambda step, base: step - base)[1]
                curve.append((value, added))
                share = f", {added / point['step_seconds'] / 10:.2f} %" if "step_seconds" in point else ""
                kept = (point["kept_bytes"][name] - point["kept_bytes"][UNPATCHED]) / 2**10 / at["num_layers"]
                row.append(f"{added:.2f} ms{share}, {kept:.0f} KiB")
            rows.append(row)
        for name, curve in curves.items():
            axis.plot(*zip(*curve), marker="o", markersize=3, label=name)
        axis.set(xlabel=factor, xscale="log", yscale="log")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
    axes[0].set_ylabel("adds to a step [ms]")
    axes[-1].legend(fontsize=7)
    figure.savefig(folder / "sweep.png", dpi=120)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    (folder / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"{folder / 'sweep.md'}, {folder / 'sweep.png'}")


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
    parser.add_argument("--whole_steps", type=int, default=3, help="--sweep: unpatched steps of the whole model")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(MAIN), help="beside 'unpatched'")
    parser.add_argument("--all_methods", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="growth curves around the shape, resumable")
    parser.add_argument("--output_dir", default="results/overhead", help="--sweep: for its table, picture and numbers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the numbers of every round of one shape")
    args = parser.parse_args()
    if min(args.rounds, args.light_rounds) < 2:
        parser.error(f"--rounds and --light_rounds must be at least 2, got {args.rounds} and {args.light_rounds}.")

    console = Console(width=140)
    methods = list(METHODS) if args.all_methods else list(dict.fromkeys([UNPATCHED, *args.methods]))
    (sweep if args.sweep else compare)(args, methods, console)
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    console.print(
        f"medians (middle half); {device}; torch {torch.__version__}; transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    replace_unprintable()
    main()
