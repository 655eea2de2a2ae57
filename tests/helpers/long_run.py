"""
Trains a tiny patched model for very long: memory and step time must not grow, nor the duals drift.

    python tests/helpers/long_run.py
    python tests/helpers/long_run.py --steps 1000000 --ema_rate 0.01

A Mixtral of one layer (8 experts, top-2) is trained with both levers on padded random tokens, in a raw loop: gradient
accumulation of two, figures read every 100 steps, an evaluation and a copy of the state every 1,000. The definition in float64
runs beside it, on what the router returned: means, prices and biases of every step. The first quarter of the steps is compared
with the last one.

| figure | must not exceed |
|---|---|
| resident memory, median of a quarter: growth | 4 MiB |
| memory of Python objects (tracemalloc), objects that the garbage collector knows: growth | 64 KiB, 20 |
| CPU time of a step, median of a quarter: ratio | 1.1 |
| a mean, off the exact one | 2^-25 / η + 2^-21 |
| a price, off the exact one | 1e-4 |
| a bias, off the exact one | steps · 2^-24 · (largest bias + bias_coef · largest price): a rounding each step |

CPU, no network; 20,000 steps take about six minutes on one core. Exit status 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import tracemalloc
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable, versions


SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 16,
}
ROWS, WIDTH, MICRO_BATCHES = 2, 8, 2


class Row(NamedTuple):
    figure: str
    first: float | None  # of the first quarter
    last: float | None
    found: float
    bound: float


class Exact:
    """Computes the duals (negative entropy) in float64 from the outputs of the router of `model`."""

    def __init__(self, model: MixtralForCausalLM, config: phb.PhiBalanceConfig) -> None:
        self.config, experts = config, model.config.num_local_experts
        self.means = {kind: torch.full((experts,), 1 / experts, dtype=torch.float64) for kind in ("probs", "load")}
        self.price = torch.zeros(experts, dtype=torch.float64)
        self.bias = torch.zeros(experts, dtype=torch.float64)
        self.mask: torch.Tensor | None = None  # (T,) of the current forward
        self.sums = {kind: torch.zeros_like(mean) for kind, mean in self.means.items()}
        self.errors = {"mean": 0.0, "price": 0.0, "bias": 0.0}  # largest so far
        self.rounding = 0.0  # upper bound of a bias's rounding in one step
        model.model.layers[0].mlp.gate.register_forward_hook(self._look)

    @torch.no_grad()
    def _look(self, module, args, output) -> None:
        if self.mask is not None:
            logits, _, chosen = output
            self.sums["probs"] += logits[self.mask].double().softmax(-1).sum(0)
            self.sums["load"] += torch.bincount(chosen[self.mask].flatten(), minlength=len(self.bias))

    def step(self) -> None:
        rate = self.config.ema_rate
        for kind, total in self.sums.items():
            self.means[kind] = (1 - rate) * self.means[kind] + rate * total / total.sum()
        self.price = price_of(self.means["probs"])
        self.bias = self.bias - self.config.bias_coef * price_of(self.means["load"])
        self.sums = {kind: torch.zeros_like(mean) for kind, mean in self.means.items()}

    def compare(self, balancer: phb.PhiBalancer) -> None:
        (name,) = balancer.layer_names
        price, bias = balancer.prices()[name], balancer.biases()[name]
        for kind, mean in self.means.items():
            self._note("mean", balancer.means(kind)[name], mean)
        self._note("price", price, self.price)
        self._note("bias", bias, self.bias)
        rounding = 2**-24 * float(bias.abs().max() + balancer.config.bias_coef * price.abs().max())
        self.rounding = max(self.rounding, rounding)

    def _note(self, kind: str, found: torch.Tensor, exact: torch.Tensor) -> None:
        self.errors[kind] = max(self.errors[kind], float((found.double() - exact).abs().max()))


def price_of(mean: torch.Tensor) -> torch.Tensor:
    price = (len(mean) * mean).log()
    return price - price.mean()


class Readings:
    """Time and memory of a run. Allocates all its room before the run begins."""

    def __init__(self, steps: int) -> None:
        self.every = max(5, steps // 200)  # steps between two readings of the memory
        self.seconds = array("d", bytes(8 * steps))
        self.resident, self.traced, self.objects = (array("d", bytes(8 * (steps // self.every))) for _ in range(3))

    def note_memory(self, step: int) -> None:
        if step % self.every:
            return
        gc.collect()
        reading = step // self.every - 1
        with open("/proc/self/statm") as file:
            self.resident[reading] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
        self.traced[reading] = tracemalloc.get_traced_memory()[0] / 1024
        self.objects[reading] = len(gc.get_objects())

    def rows(self) -> list[Row]:
        grown = {
            "resident memory, KiB": (self.resident, 4096),
            "Python objects' memory, KiB": (self.traced, 64),
            "Python objects": (self.objects, 20),
        }
        rows = []
        for figure, (values, bound) in grown.items():
            first, last = quarters(values)
            rows.append(Row(figure, first, last, last - first, bound))
        first, last = quarters(self.seconds)
        return [*rows, Row("CPU time of a step, ms", 1e3 * first, 1e3 * last, last / first, 1.1)]


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """Returns the medians of the first and last quarter, without the first twentieth, in which caches fill."""
    values = values[len(values) // 20 :]
    count = max(len(values) // 4, 1)
    return statistics.median(values[:count]), statistics.median(values[-count:])


def run(steps: int, ema_rate: float = 0.3, seed: int = 0) -> list[Row]:
    torch.manual_seed(seed)
    config = phb.PhiBalanceConfig(coef=0.01, bias_coef=0.001, ema_rate=ema_rate)
    model = phb.patch(MixtralForCausalLM(MixtralConfig(**SHAPE)), config).train()
    balancer, exact = phb.get_balancer(model), Exact(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    readings = Readings(steps)
    gc.collect()
    gc.freeze()  # keeps existing objects out of every collection
    tracemalloc.start()
    try:
        for step in range(1, steps + 1):
            began = time.process_time()
            batches = [draw() for _ in range(MICRO_BATCHES)]
            balancer.begin_step(batches)
            for batch in batches:
                exact.mask = batch["attention_mask"].flatten().bool()
                (model(**batch).loss / MICRO_BATCHES).backward()
            exact.mask = None
            optimizer.step()
            optimizer.zero_grad()
            balancer.step()
            readings.seconds[step - 1] = time.process_time() - began
            exact.step()
            exact.compare(balancer)
            if step % 100 == 0:
                balancer.check_finite()
                balancer.metrics()
            if step % 1000 == 0:
                balancer.load_state_dict(balancer.state_dict())
                with balancer.evaluation(), torch.no_grad():
                    model.eval()(**draw())
                    balancer.eval_metrics()
                model.train()
            readings.note_memory(step)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    bounds = {"mean": 2**-25 / ema_rate + 2**-21, "price": 1e-4, "bias": steps * exact.rounding}
    off = [Row(f"{kind}, off float64", None, None, exact.errors[kind], bound) for kind, bound in bounds.items()]
    return [*readings.rows(), *off]


def draw() -> dict[str, torch.Tensor]:
    """Returns random rows of unequal length."""
    ids = torch.randint(1, SHAPE["vocab_size"], (ROWS, WIDTH))
    mask = (torch.arange(WIDTH) < torch.randint(2, WIDTH + 1, (ROWS, 1))).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--ema_rate", type=float, default=0.3, help="η, the weight of the new step in the means")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = run(args.steps, args.ema_rate, args.seed)
    print(f"{args.steps:,} steps, η = {args.ema_rate}, seed {args.seed}, {time.perf_counter() - began:.0f} s\n")
    print("| figure | first quarter | last quarter | found | at most | |\n|---|--:|--:|--:|--:|---|")
    for row in rows:
        first, last = ("" if value is None else f"{value:,.2f}" for value in (row.first, row.last))
        verdict = "ok" if row.found <= row.bound else "EXCEEDED"
        print(f"| {row.figure} | {first} | {last} | {row.found:.3g} | {row.bound:.3g} | {verdict} |")
    print("\n" + ", ".join(f"{name} {version}" for name, version in versions().items()))
    return int(any(row.found > row.bound for row in rows))


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
