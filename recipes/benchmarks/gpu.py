"""One command for nine minutes of a GPU: what balancing costs there, eager and compiled, and what it does to a larger model.

    python recipes/benchmarks/gpu.py --data path/to/data --output_dir results/gpu
    python recipes/benchmarks/gpu.py --device cpu --small     # the same on a CPU, at the size of a toy

1. Steps (forward, backward, AdamW, and where patched `begin_step` and `step`) of a Qwen3-MoE of 328 M parameters with 64
   experts, autocast to bf16: unpatched, with the built-in loss, and patched, each eager and under `torch.compile`. Every
   variant is a model of its own; they take turns, in an order that changes from round to round, and each is compared with
   the unpatched step of the same round. Time is by events, memory the allocator's peak of a step over what the model and its
   optimizer hold.
2. `recipes/compare.py recipes/compare/gpu.yaml`: six methods on that model, as long as there is time left.

Everything goes to `output_dir` as soon as it is known: `steps.json`, `steps.md`, and what the comparison writes.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable


RECIPES = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "built-in loss": None,
    "price": {"coef": 0.01},
    "price and bias": {"coef": 0.01, "bias_coef": 0.001},
}
PLANS = yaml.safe_load((RECIPES / "compare" / "gpu.yaml").read_text(encoding="utf-8"))["defaults"]
SHAPE = {"vocab_size": PLANS["vocab_size"], **PLANS["model_fields"]}
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class Variant:
    """A model of its own that takes steps on one batch."""

    def __init__(self, name: str, compiled: bool, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen3_moe",
            **(SHAPE | (SMALL if args.small else {})),
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            output_router_logits=name == "built-in loss",
            use_cache=False,
        )
        self.model = (
            AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").to(args.device).train()
        )
        self.balancer = None
        if VARIANTS[name] is not None:
            phb.patch(self.model, phb.PhiBalanceConfig(**VARIANTS[name]))
            self.balancer = phb.get_balancer(self.model)
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        rows, length = (2, 32) if args.small else (args.rows, args.length)
        self.batch = {"input_ids": torch.randint(config.vocab_size, (rows, length), device=args.device)}
        self.batch["labels"] = self.batch["input_ids"]
        self.device = args.device

    def step(self) -> None:
        if self.balancer is not None:
            self.balancer.begin_step([self.batch])
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.run(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balancer is not None:
            self.balancer.step()

    def timed(self) -> tuple[float, float]:
        """Milliseconds of a step, and MiB that it needed at most beside what was held before."""
        if self.device != "cuda":
            began = time.process_time()
            self.step()
            return 1e3 * (time.process_time() - began), 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - held) / 2**20


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Time and memory of steps by variant, in rounds in which all take turns."""
    variants = {}
    for compiled in (False, True) if args.compile else (False,):
        for name in VARIANTS:
            label = f"{name}, compiled" if compiled else name
            began = time.perf_counter()
            variant = Variant(name, compiled, args)
            try:
                for _ in range(4):  # what is checked or compiled once
                    variant.step()
            except Exception as error:
                print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            variants[label] = variant
            print(f"{label}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in variants}
    order = list(variants)
    for index in range(args.rounds):
        random.Random(index).shuffle(order)
        for label in order:
            found[label].append(variants[label].timed())
    return found


def table(found: dict[str, list[tuple[float, float]]], tokens: int) -> str:
    """One row for each variant; compared with the unpatched step, compiled or not, of the same round."""
    lines = [
        "| | step, ms | against unpatched | tokens a second | memory of a step, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, rounds in found.items():
        base = found.get("unpatched, compiled" if label.endswith("compiled") else "unpatched", rounds)
        milliseconds = statistics.median(ms for ms, _ in rounds)
        ratios = sorted(own / other for (own, _), (other, _) in zip(rounds, base))
        spread = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
        against = f"{statistics.median(ratios):.3f} ({spread})"
        memory = statistics.median(mib for _, mib in rounds)
        lines.append(
            f"| {label} | {milliseconds:.2f} | {against} | {1e3 * tokens / milliseconds:,.0f} | {memory:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as for the comparison; without it only steps are timed")
    parser.add_argument("--output_dir", type=Path, default=Path("results/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the size of a toy")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which the comparison is stopped")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    tokens = 64 if args.small else args.rows * args.length
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    note = f"{machine}; torch {torch.__version__}; transformers {transformers.__version__}; {tokens} tokens a step; medians"
    (args.output_dir / "steps.json").write_text(json.dumps({"note": note, "rounds": found}))
    (args.output_dir / "steps.md").write_text(f"{table(found, tokens)}\n\n{note} (middle half).\n", encoding="utf-8")
    print((args.output_dir / "steps.md").read_text(encoding="utf-8"), flush=True)
    if args.data is None:
        return 0
    command = [sys.executable, str(RECIPES / "compare.py"), str(RECIPES / "compare" / "gpu.yaml")]
    command += ["--data", args.data, "--output_dir", str(args.output_dir)]
    try:
        return subprocess.run(command, timeout=max(1.0, deadline - time.monotonic())).returncode
    except subprocess.TimeoutExpired:
        print("The time is up; the runs that are finished are kept.")
        return subprocess.run([*command, "--tables"]).returncode


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
