"""Training from scratch: a run trains a small model on one stream of text and measures it on held-out text."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_phibalance as phb

from . import harness, text
from .capacity import examine_capacity, limited
from .measures import changed_share, examine_text, recorded_choices, steps_to_recover, thin
from .models import MODELS, build_model
from .training import Diverged, environment, micro_batches, optimize, served_plainly


CHURN_PROBES = 8
CHURN_WINDOWS = 8  # of each domain
KEYS = ()
SETTLED = 0.75  # figures "in training" are those of the last quarter of the steps


def axes(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {"models": {name: name for name in MODELS}, "streams": {name: name for name in text.STREAMS}}


@dataclass(kw_only=True)
class Run(harness.Run):
    """A run from scratch."""

    model: str  # a key of `models.MODELS`
    stream: str  # one of `text.STREAMS`
    rows: int = 9  # windows of a step, sorted by domain
    window: int = 64  # tokens
    micro_batches: int = 1  # per step; if as many as domains, each micro-batch of a mixed step holds one domain
    learning_rate: float = 0.003  # peak
    weight_decay: float = 0.1  # of matrices only
    model_fields: dict[str, Any] = field(default_factory=dict)  # config fields that replace those in `MODELS`
    vocab_size: int = 1024
    validation_windows: int = 192  # held-out windows of each domain
    device: str = "cpu"
    precision: str = "fp32"  # "bf16": autocast over fp32 weights
    capacity: float = 0.0  # of the experts in training, times the mean load; 0: no limit
    capacities: list[float] = field(default_factory=list)  # of evaluations besides the one without a limit

    def __post_init__(self) -> None:
        if min(self.steps, self.window) < 1 or not 1 <= self.micro_batches <= self.rows:
            raise ValueError(
                "`steps` and `window` must be at least 1 and `micro_batches` from 1 to `rows`, got "
                f"{self.steps}, {self.window}, {self.micro_batches} and {self.rows}."
            )

    def __str__(self) -> str:
        method = " ".join(f"{name}={value}" for name, value in self.method.items())
        return f"{self.model} {self.stream} seed {self.seed}  {method}"

    @classmethod
    def prepare(cls, data: str, settings: Mapping[str, Any], output: Path) -> str:
        shape = (settings.get(name, getattr(cls, name)) for name in ("window", "vocab_size", "validation_windows"))
        return _fingerprint(data, *shape, output / "text")

    def train(self, output: Path) -> dict[str, Any]:
        return train(self, text.load_corpus(self.corpus, output / "text"))


@functools.lru_cache
def _fingerprint(*arguments: Any) -> str:
    return text.build_corpus(*arguments).fingerprint


def train(run: Run, corpus: text.Corpus) -> dict[str, Any]:
    """
    Trains one model and measures it. Returns `metrics` (only the step if it diverged), `curve`, `experts` (shares of the assignments
    by layer, domain and expert) and `environment`; with `capacities` also `halves` (assignments by layer, half of the text and expert).
    """
    model = build_model(run.model, corpus.vocab_size, run.seed, **run.model_fields).to(run.device)
    phb.patch(model, run.config)
    balancer = phb.get_balancer(model)
    settled = int(SETTLED * run.steps)
    probes = {settled + (run.steps - settled) * i // CHURN_PROBES for i in range(CHURN_PROBES)}
    probe = torch.cat([corpus.validation[domain][:CHURN_WINDOWS] for domain in text.DOMAINS]).to(run.device)
    if run.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    stream = text.batches(corpus, run.stream, run.steps, run.rows, run.seed)
    batches = [micro_batches(ids.to(run.device), run.micro_batches) for ids in stream]
    steps, churn = [], []
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        biases = balancer.biases()
        with limited(model, run.capacity):
            for step in optimize(model, batches, run.steps, run.learning_rate, run.weight_decay, run.precision):
                if len(steps) in probes:
                    churn.append(moved_by_bias(model, balancer, probe, biases))
                steps.append(step)
                biases = balancer.biases()
        figures, experts = examine_text(model, balancer, corpus.validation, run.rows)
        if not math.isfinite(figures["loss"]):
            raise Diverged(run.steps)
    except Diverged as error:
        metrics = {"diverged_at": error.args[0]}
        return {"metrics": metrics, "curve": {}, "experts": [], "environment": environment()}
    if run.is_served_plainly:
        last = [{"input_ids": torch.cat([part["input_ids"] for part in parts])} for parts in batches]
        figures |= served_plainly(
            model, last, lambda twin: examine_text(twin, phb.get_balancer(twin), corpus.validation, run.rows)[0]
        )
    record: dict[str, Any] = {"experts": experts, "environment": environment()}
    if run.capacities:
        found, record["halves"] = examine_capacity(model, balancer, corpus.validation, run.rows, run.capacities)
        figures |= found
    losses, max_vios, _, milliseconds = zip(*steps)
    figures |= {
        "train_loss": statistics.fmean(losses[settled:]),
        "max_vio_train_batch": statistics.fmean(max_vios[settled:]),
        "churn": statistics.fmean(churn),
        "step_ms": statistics.median(milliseconds),
        "run_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }
    if run.device.startswith("cuda"):
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if run.stream == "shift":
        switch, soon = run.steps // 2, max(1, run.steps // 10)
        figures |= {
            "recovery_steps": steps_to_recover(max_vios, switch),
            "max_vio_after_shift": statistics.fmean(max_vios[switch : switch + soon]),
            "steps_to_old_loss": steps_to_recover(losses, switch, within=1.0),
            "loss_after_shift": statistics.fmean(losses[switch : switch + soon]),
        }
    curve = {"loss": thin(losses, len(text.DOMAINS)), "max_vio": thin(max_vios, len(text.DOMAINS))}
    return {**record, "metrics": figures, "curve": curve}


@torch.no_grad()
def choose(model: nn.Module, balancer: phb.PhiBalancer, ids: Tensor) -> list[Tensor]:
    """Returns the experts `(T, k)` that each layer chooses for `ids` in eval mode."""
    model.eval()
    with recorded_choices(balancer) as chosen:
        model.base_model(input_ids=ids)
    model.train()
    return chosen


def moved_by_bias(model: nn.Module, balancer: phb.PhiBalancer, ids: Tensor, before: Mapping[str, Tensor]) -> float:
    """Returns the share of the choices for `ids` that differ between the present biases and those in `before`."""
    after, chosen = balancer.biases(), choose(model, balancer, ids)
    balancer.set_biases(before)
    chosen_before = choose(model, balancer, ids)
    balancer.set_biases(after)
    return changed_share(chosen_before, chosen)
