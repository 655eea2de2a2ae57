"""What balancing costs: step time and memory of every method against the unpatched model and the built-in loss.

    python recipes/benchmarks/overhead.py                                   # the table of the guide on cost
    python recipes/benchmarks/overhead.py --num_experts 128 --tokens 1024 --rounds 40 --json overhead.json
    python recipes/benchmarks/overhead.py --sweep --output_dir results/overhead   # growth with experts, tokens, layers ...

A step is forward, backward and, where patched, `begin_step` and `step` of the balancer; no optimizer, which would only dilute the
differences. All methods take turns on the same model and batch, in an order that changes from round to round. Each is compared
with the unpatched step of the same round.

A step of the whole model varies by several per cent, more than any method costs. What a method adds depends only on the routers,
so it is also measured on a model with the same routers and a light body (stand-ins for attention and experts that pass gradients
on), and given in milliseconds and as a share of the step of the whole model.

On a CPU the time is that of the process, since other processes come and go. On a GPU it is wall time after the queued work is
done. Memory is what autograd keeps for the backward pass, counted tensor by tensor, and on a GPU the allocator's peak as well.
"""

import argparse
import contextlib
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable


UNPATCHED, BUILT_IN = "unpatched", "built-in aux loss"
WATCHED, LOGGED = "watched", "watched and logged"
METHODS: dict[str, dict[str, Any] | None] = {
    UNPATCHED: None,
    BUILT_IN: None,
    "price gradient": {"coef": 0.01},
    "dual bias": {"coef": 0.0, "bias_coef": 0.001},
    "gradient and bias": {"coef": 0.01, "bias_coef": 0.001},
    "gradient, current price": {"coef": 0.01, "price_from": "current"},
    "switch": {"method": "switch"},
    "pooled": {"method": "pooled"},
    "global batch": {"method": "global_batch"},
    "loss-free": {"method": "loss_free"},
    "quantile": {"method": "quantile"},
    "counting only": {"method": "none"},
    WATCHED: {"method": "none"},
    LOGGED: {"method": "none"},  # a step that measures confidence, and a log
}
MAIN = (UNPATCHED, BUILT_IN, "price gradient", "dual bias", "gradient and bias")
LIGHT_HIDDEN_SIZE, LIGHT_EXPERT_SIZE = 128, 8
WHOLE_LIMIT = 2**25  # hidden size × tokens × layers of which a CPU still runs the whole model in seconds
SHAPE = ("model_type", "hidden_size", "num_layers", "num_experts", "top_k", "expert_size", "tokens", "dtype", "device")
SWEEPS = {
    "num_experts": (8, 16, 32, 64, 128, 256),
    "top_k": (1, 2, 4, 8),
    "hidden_size": (256, 512, 1024, 2048),
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),
    "num_layers": (2, 4, 8, 16, 32, 48),
}


class Bench:
    """A model and its batch, to be patched for each method. `light`: with stand-ins for attention and experts."""

    def __init__(self, args: argparse.Namespace, light: bool = False) -> None:
        torch.manual_seed(0)
        hidden = LIGHT_HIDDEN_SIZE if light else args.hidden_size
        expert = LIGHT_EXPERT_SIZE if light else args.expert_size
        config = AutoConfig.for_model(
            args.model_type,
            vocab_size=64 if light else 1024,
            hidden_size=hidden,
            num_hidden_layers=args.num_layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            intermediate_size=expert,
            moe_intermediate_size=expert,
            num_experts=args.num_experts,
            num_local_experts=args.num_experts,
            num_experts_per_tok=args.top_k,
            max_position_embeddings=max(args.tokens, 2048),
        )
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device).train()
        if light:
            lighten(model)
        model.router_aux_loss_coef = 0.001
        shape = (args.batch_size, args.tokens // args.batch_size)
        ids = torch.randint(0, config.vocab_size, shape, device=args.device)
        self.model, self.batch = model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.is_cuda = ids.is_cuda

    @contextlib.contextmanager
    def patched(self, name: str) -> Iterator[Callable[[], None]]:
        """Yields a function that takes one step by a method."""
        balancer = None
        if METHODS[name] is not None:
            phb.patch(self.model, phb.PhiBalanceConfig(**METHODS[name]))
            balancer = phb.get_balancer(self.model)
        watch = phb.watch(self.model) if name in (WATCHED, LOGGED) else None
        own = {"output_router_logits": name == BUILT_IN} if balancer is None else {}

        def step() -> None:
            if balancer is not None:
                balancer.begin_step([self.batch])
            self.model(**self.batch, **own).loss.backward()
            if balancer is not None:
                balancer.step()
            if watch is not None and name == LOGGED:
                watch.log()
            for parameter in self.model.parameters():
                parameter.grad = None

        try:
            yield step
        finally:
            if watch is not None:
                watch.stop()
            phb.unpatch(self.model)

    def clock(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.is_cuda else time.process_time()

    def seconds(self, name: str) -> float:
        """Time of the third step after patching: the first checks the set-up, the second what the prices reach."""
        with self.patched(name) as step:
            step()
            step()
            began = self.clock()
            step()
            return self.clock() - began

    def rounds(self, methods: Sequence[str], count: int) -> dict[str, list[float]]:
        """Seconds of a step by method, in rounds in which all methods take turns."""
        times: dict[str, list[float]] = {name: [] for name in methods}
        order = list(methods)
        for index in range(count):
            random.Random(index).shuffle(order)
            for name in order:
                times[name].append(self.seconds(name))
        return times

    def kept_bytes(self, name: str) -> int:
        """Bytes of distinct storages, parameters aside, that autograd holds between forward and backward."""
        held = {}
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with self.patched(name) as step, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
        return sum(held.values())

    def peak_bytes(self, name: str) -> int:
        """The allocator's peak during one step; 0 on a CPU."""
        if not self.is_cuda:
            return 0
        with self.patched(name) as step:
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated()


def lighten(model: torch.nn.Module) -> None:
    """Replaces attention and experts by stand-ins through which gradients flow as before."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("Attention"):
            module.forward = lambda hidden_states, *args, **kwargs: (0.5 * hidden_states, None)
        elif name.endswith("Experts"):
            module.forward = lambda hidden, chosen, weights: hidden * weights.sum(-1, keepdim=True).to(hidden.dtype)


def paired(times: dict[str, list[float]], name: str, compare: Callable[[float, float], float]) -> list[float]:
    """Lower quartile, median and upper quartile of `compare(step, unpatched step of the same round)`."""
    return statistics.quantiles([compare(*pair) for pair in zip(times[name], times[UNPATCHED])], n=4)


def added(times: dict[str, list[float]], name: str) -> list[float]:
    """Quartiles of the milliseconds that a method adds to a step."""
    return [1e3 * value for value in paired(times, name, lambda step, base: step - base)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def one_shape(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Prints whole steps, what each method adds, and memory."""
    bench = Bench(args)
    kept = {name: bench.kept_bytes(name) for name in methods}
    peak = {name: bench.peak_bytes(name) for name in methods}
    whole = bench.rounds(methods, args.rounds)
    del bench
    light = Bench(args, light=True).rounds(methods, args.light_rounds)
    unpatched = statistics.median(whole[UNPATCHED])
    rows = [["method", "step [ms]", "ratio, paired", "adds [ms]", "ratio, from what it adds", "keeps [KiB/layer]"]]
    for name in methods:
        low, ratio, high = paired(whole, name, lambda step, base: step / base)
        less, more_time, more = added(light, name)
        memory = f"{(kept[name] - kept[UNPATCHED]) / 2**10 / args.num_layers:.0f}"
        memory += f" (peak {peak[name] / 2**20:.0f} MiB)" * bool(peak[name])
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(whole[name]):.1f}",
                f"{ratio:.4f} ({low:.4f} to {high:.4f})",
                f"{more_time:.2f} ({less:.2f} to {more:.2f})",
                f"{1 + more_time / 1e3 / unpatched:.4f}",
                memory,
            ]
        )
    print(
        f"{args.model_type}, {args.tokens} tokens, {args.num_experts} experts, top-{args.top_k}\n\n{markdown(rows)}\n"
    )
    logits = args.tokens * args.num_experts * getattr(torch, args.dtype).itemsize / 2**10
    print(f"one logits tensor: {logits:.0f} KiB; {args.rounds} and {args.light_rounds} rounds")
    if args.json:
        figures = {"seconds": whole, "light_seconds": light, "kept_bytes": kept, "peak_bytes": peak}
        Path(args.json).write_text(json.dumps({"arguments": vars(args), **figures}, indent=1))


def sweep(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Measures what each method adds, one factor at a time. Every finished point is kept and not measured again."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    points = {key_of(point["shape"]): point for point in map(json.loads, lines)}
    for factor, values in SWEEPS.items():
        for value in values:
            at = argparse.Namespace(**(vars(args) | {factor: value}))
            key = key_of(vars(at))
            if key in points or at.top_k > at.num_experts:
                continue
            bench = Bench(at, light=True)
            kept = {name: bench.kept_bytes(name) for name in methods}
            times = bench.rounds(methods, args.light_rounds)
            point = {"shape": json.loads(key), "light_seconds": times, "kept_bytes": kept}
            # the whole model only as the measure of a step; on a CPU, sizes that take minutes are left out
            if at.device == "cuda" or at.hidden_size * at.tokens * at.num_layers <= WHOLE_LIMIT:
                bench = Bench(at)
                point["step_seconds"] = statistics.median(bench.seconds(UNPATCHED) for _ in range(args.whole_steps))
            points[key] = point
            with file.open("a") as out:
                out.write(json.dumps(point) + "\n")
            print(f"{factor} {value}", flush=True)
    present(args, methods, points, folder)


def key_of(shape: dict[str, Any]) -> str:
    return json.dumps({name: shape[name] for name in SHAPE}, sort_keys=True)


def present(args: argparse.Namespace, methods: Sequence[str], points: dict[str, dict[str, Any]], folder: Path) -> None:
    """Writes a table and a picture: time added to a step, and bytes kept per layer for the backward, by method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(4 * len(SWEEPS), 4), sharey=True, layout="constrained")
    others = [name for name in methods if name != UNPATCHED]
    rows = [["factor", "value", "step [ms]", *others]]
    for axis, (factor, values) in zip(axes, SWEEPS.items()):
        at = {value: points.get(key_of(vars(args) | {factor: value})) for value in values}
        at = {value: point for value, point in at.items() if point is not None}
        for name in others:
            more = [added(point["light_seconds"], name)[1] for point in at.values()]
            axis.plot(list(at), more, marker="o", markersize=3, label=name)
        for value, point in at.items():
            step = point.get("step_seconds")
            row = [factor, str(value), f"{1e3 * step:.0f}" if step else "-"]
            for name in others:
                more = added(point["light_seconds"], name)[1]
                kept = (
                    (point["kept_bytes"][name] - point["kept_bytes"][UNPATCHED]) / 2**10 / point["shape"]["num_layers"]
                )
                row.append(f"{more:.2f} ms" + (f", {more / step / 10:.2f} %" if step else "") + f", {kept:.0f} KiB")
            rows.append(row)
        axis.set(xlabel=factor, xscale="log", yscale="log")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
    axes[0].set_ylabel("adds to a step [ms]")
    axes[-1].legend(fontsize=7)
    figure.savefig(folder / "sweep.png", dpi=120)
    (folder / "sweep.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print(f"{folder / 'sweep.md'}, {folder / 'sweep.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_type", default="qwen3_moe")
    shape = {"hidden_size": 1024, "num_layers": 4, "num_experts": 64, "top_k": 8, "expert_size": 256, "tokens": 1024}
    for name, default in (shape | {"batch_size": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
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
    methods = list(METHODS) if args.all_methods else list(dict.fromkeys([UNPATCHED, *args.methods]))
    (sweep if args.sweep else one_shape)(args, methods)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    print(f"medians (middle half); {machine}; torch {torch.__version__}; transformers {transformers.__version__}")


if __name__ == "__main__":
    replace_unprintable()
    main()
