"""The training loop of a run, and what is read off it."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_phibalance as phb
from hf_phibalance.maths import max_vio

from .clock import Clock
from .corpus import Corpus, load_corpus
from .documents import DOMAINS
from .measures import balance_figures, changed_share, count_by_window, recorded_choices, steps_to_recover, thin
from .models import build_model
from .portable import FITTED, served_plainly
from .run import Run
from .streams import batches, switch_step
from .unfinished import Unfinished


CURVE_POINTS = 50
CHURN_PROBES = 8
CHURN_WINDOWS = 8  # of each domain
SETTLED = 0.75  # the last quarter of the steps is what "in training" means


class Diverged(Exception):
    """The loss is no longer a number."""


def train_on(run: Run, output: Path, tell: Callable[[int], None]) -> dict[str, Any]:
    """[`train`] on the text that lies in `output`, for workers."""
    unfinished = Unfinished(output / "unfinished" / f"{run.key}-{run.corpus}.pt")
    record = train(run, load_corpus(run.corpus, output / "text"), tell, unfinished)
    unfinished.remove()
    return record


def train(
    run: Run,
    corpus: Corpus,
    tell: Callable[[int], None] = lambda step: None,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """
    Trains one model and examines it.

    Args:
        run (`Run`): What to train.
        corpus (`Corpus`): Its text.
        tell (`Callable`, *optional*): Called with the number of finished steps.
        unfinished (`Unfinished`, *optional*): Where what it needs to go on is kept meanwhile. The times of a run that was
            taken up are those of its last part.

    Returns:
        `dict`: one line of the results file: `key`, `settings`, `metrics`, `curve`, `experts` (share of the assignments
        by layer, domain and expert) and `environment`. Of a run that diverged, `metrics` has only the step.
    """
    model = build_model(run.model, corpus.vocab_size, run.seed, **run.model_fields).to(run.device)
    corpus = corpus.to(run.device)
    phb.patch(model, run.config)
    balancer = phb.get_balancer(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, run.weight_decay), lr=run.learning_rate, betas=(0.9, 0.95), fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, run.steps))
    settled = int(SETTLED * run.steps)
    probes = {settled + (run.steps - settled) * i // CHURN_PROBES for i in range(CHURN_PROBES)}
    probe = torch.cat([corpus.validation[domain][:CHURN_WINDOWS] for domain in DOMAINS])
    record = {"key": run.key, "settings": run.settings, "environment": environment()}
    if run.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "balancer": balancer}
    notes: dict[str, list[float]] = {"losses": [], "max_vios": [], "churn": []}
    notes |= unfinished.take_up(parts) if unfinished else {}
    losses, max_vios, churn = notes["losses"], notes["max_vios"], notes["churn"]
    clock = Clock(run.device)
    start, cpu_start = time.perf_counter(), time.process_time()
    stream = enumerate(batches(corpus, run.stream, run.steps, run.rows, run.seed))
    try:
        for step, ids in itertools.islice(stream, len(losses), None):
            clock.step()
            biases = balancer.biases() if step in probes else None
            clock.start()
            micro_batches = ids.to(run.device).tensor_split(run.micro_batches)
            balancer.begin_step([{"input_ids": part} for part in micro_batches])
            total = torch.zeros((), device=run.device)
            for part in micro_batches:
                with torch.autocast(run.device, torch.bfloat16, enabled=run.precision == "bf16"):
                    loss = model(input_ids=part, labels=part).loss * (len(part) / len(ids))
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            clock.stop()
            if biases is not None:
                churn.append(moved_by_bias(model, balancer, probe, biases))
            losses.append(float(total))
            max_vios.append(float(max_vio(torch.stack(list(balancer.loads().values()))).mean()))
            if not math.isfinite(losses[-1]):
                raise Diverged
            if unfinished:
                unfinished.keep(parts, notes)
            tell(step + 1)
        figures, experts = examine(model, balancer, corpus.validation, run.rows)
        if not math.isfinite(figures["loss"]):
            raise Diverged
    except Diverged:
        return {**record, "metrics": {"diverged_at": len(losses)}, "curve": {}, "experts": []}
    if run.is_served_plainly:
        figures |= served_plainly(
            model,
            list(batches(corpus, run.stream, run.steps, run.rows, run.seed))[-FITTED:],
            lambda twin: examine(twin, phb.get_balancer(twin), corpus.validation, run.rows)[0],
        )
    figures |= {
        "train_loss": statistics.fmean(losses[settled:]),
        "max_vio_train_batch": statistics.fmean(max_vios[settled:]),
        "churn": statistics.fmean(churn),
        "step_ms": clock.milliseconds(),
        "run_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }
    if run.device.startswith("cuda"):
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if run.stream == "shift":
        switch = switch_step(run.steps)
        soon = max(1, run.steps // 10)
        figures |= {
            "recovery_steps": steps_to_recover(max_vios, switch),
            "max_vio_after_shift": statistics.fmean(max_vios[switch : switch + soon]),
            "steps_to_old_loss": steps_to_recover(losses, switch, within=1.0),
            "loss_after_shift": statistics.fmean(losses[switch : switch + soon]),
        }
    curve = {
        name: rounded(thin(values, CURVE_POINTS, len(DOMAINS)))
        for name, values in (("loss", losses), ("max_vio", max_vios))
    }
    return {**record, "metrics": figures, "curve": curve, "experts": experts}


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without; frozen parameters in neither."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over 5% of the steps, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def choose(model: torch.nn.Module, balancer: phb.PhiBalancer, ids: Tensor) -> list[Tensor]:
    """The experts `(T, k)` that each layer chooses for `ids`, in eval mode."""
    model.eval()
    with recorded_choices(balancer) as chosen:
        model.base_model(input_ids=ids)
    model.train()
    return chosen


def moved_by_bias(
    model: torch.nn.Module, balancer: phb.PhiBalancer, ids: Tensor, before: Mapping[str, Tensor]
) -> float:
    """Share of the choices for `ids` that are others with the biases as they are than with those of `before`."""
    after, chosen = balancer.biases(), choose(model, balancer, ids)
    balancer.set_biases(before)
    chosen_before = choose(model, balancer, ids)
    balancer.set_biases(after)
    return changed_share(chosen_before, chosen)


@torch.no_grad()
def examine(
    model: torch.nn.Module,
    balancer: phb.PhiBalancer,
    validation: Mapping[str, Tensor],
    rows: int,
    batch: int = 16,
) -> tuple[dict[str, float], list]:
    """Loss by domain and balance over all held-out windows `(W, S)`, and the shares of the experts `(L, D, E)`."""
    model.eval()
    losses, counts = {}, []
    num_experts = balancer.sites[0].num_experts
    for domain, windows in validation.items():
        sums, by_window = [], []
        for ids in windows.split(batch):
            with recorded_choices(balancer) as chosen:
                loss = model(input_ids=ids, labels=ids).loss
            sums.append(float(loss) * len(ids))
            by_window.append(count_by_window(chosen, len(ids), num_experts))
        losses[domain] = math.fsum(sums) / len(windows)
        counts.append(torch.cat(by_window))
    model.train()
    counts_DWLE = torch.stack(counts)
    figures = {"loss": statistics.fmean(losses.values()), **{f"loss_{name}": loss for name, loss in losses.items()}}
    figures |= balance_figures(counts_DWLE, rows)
    by_domain_DLE = counts_DWLE.sum(1)
    shares_LDE = (by_domain_DLE / by_domain_DLE.sum(-1, keepdim=True)).transpose(0, 1)
    return figures, [[rounded(shares) for shares in layer] for layer in shares_LDE.tolist()]


def environment() -> dict[str, Any]:
    """Versions that figures may depend on."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    } | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    return [round(value, digits) for value in values]
