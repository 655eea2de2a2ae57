"""Fine-tuning one model by one method, and what is measured before and after."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_phibalance as phb
from hf_phibalance.maths import max_vio

from ..loop import CURVE_POINTS, Diverged, environment, lr_factor, parameter_groups, rounded
from ..loop import examine as examine_text
from ..measures import changed_share, recorded_choices, thin
from ..portable import FITTED, served_plainly
from .bases import load_base
from .grading import score
from .material import IGNORED, Encoded, Material, collate, load_material
from .run import Tuning
from .ways import prepare


FIRST_STEPS = 50  # of which every step's figures are kept


def tune_on(run: Tuning, output: Path, tell: Callable[[int], None]) -> dict[str, Any]:
    """[`tune`] with what lies in `output`, for workers."""
    return tune(run, _material(run.corpus, output), output, tell)


_material = lru_cache(1)(load_material)


def tune(
    run: Tuning, material: Material, output: Path, tell: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """
    Fine-tunes a base and examines it.

    Args:
        run (`Tuning`): What to do.
        material (`Material`): Texts and exercises.
        output (`pathlib.Path`): Where the bases are.
        tell (`Callable`, *optional*): Called with the number of finished steps.

    Returns:
        `dict`: a line of the results file, as `compare.loop.train` returns it; `curve` also has each of the first steps.
    """
    task = material.tasks[run.task]
    model = load_base(run.base, material, output)
    if run.steps == 0:
        return {**_head(run), "metrics": untouched(model, run, task, material), "curve": {}, "experts": []}
    phb.patch(model, run.config)
    balancer = phb.get_balancer(model)
    before = choices_on(model, balancer, task)
    trained = prepare(model, run.way, run.rank, run.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(trained, run.weight_decay), lr=run.learning_rate, betas=(0.9, 0.95), fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, run.steps))
    stream = batches(task, rows_of(task, run.tokens), run.seed)
    if run.method.get("calibrate"):
        ahead = [collate(next(stream)) for _ in range(run.method["calibrate"])]
        phb.calibrate(trained, ahead, bias=run.method.get("calibrate_bias", False))
        stream = batches(task, rows_of(task, run.tokens), run.seed)  # the same batches, from the start
    curves: dict[str, list[float]] = {"loss": [], "max_vio": [], "gradient_norm": []}
    first: dict[str, float] = {}
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        for step in range(run.steps):
            rows = next(stream)
            parts = [collate(rows[i :: run.micro_batches]) for i in range(run.micro_batches)]
            wanted = sum(int((part["labels"] != IGNORED).sum()) for part in parts)
            balancer.begin_step(parts)
            total = 0.0
            for part in parts:
                loss = trained(**part, num_items_in_batch=wanted).loss
                loss.backward()
                total += float(loss.detach())
            norm = nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            balancer.step()
            curves["loss"].append(total)
            curves["gradient_norm"].append(float(norm))
            curves["max_vio"].append(float(max_vio(torch.stack(list(balancer.loads().values()))).mean()))
            if not math.isfinite(total):
                raise Diverged
            if step + 1 == FIRST_STEPS:
                first["rerouted_first"] = changed_share(before, choices_on(trained, balancer, task))
            tell(step + 1)
        figures = examine(trained, balancer, task, material, before)
        if not math.isfinite(figures["loss"]):
            raise Diverged
    except Diverged:
        return {**_head(run), "metrics": {"diverged_at": len(curves["loss"])}, "curve": {}, "experts": []}
    if run.is_served_plainly:
        last = batches(task, rows_of(task, run.tokens), run.seed)
        figures |= served_plainly(
            trained,
            [collate(rows) for rows in itertools.islice(last, run.steps)][-FITTED:],
            lambda twin: examine(twin, phb.get_balancer(twin), task, material, before),
        )
    figures |= {
        **first,
        "max_vio_train_batch": statistics.fmean(curves["max_vio"][-run.steps // 4 :]),
        "run_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }
    curve = {name: rounded(thin(values, CURVE_POINTS)) for name, values in curves.items()}
    curve |= {f"first_{name}": rounded(values[:FIRST_STEPS]) for name, values in curves.items()}
    return {**_head(run), "metrics": figures, "curve": curve, "experts": []}


def _head(run: Tuning) -> dict[str, Any]:
    return {"key": run.key, "settings": run.settings, "environment": environment()}


def untouched(model: nn.Module, run: Tuning, task: Encoded, material: Material) -> dict[str, float]:
    """The figures of the base as it is."""
    phb.patch(model, phb.PhiBalanceConfig(method="none"))
    balancer = phb.get_balancer(model)
    start = time.perf_counter()
    figures = examine(model, balancer, task, material, choices_on(model, balancer, task))
    return {**figures, "run_seconds": time.perf_counter() - start}


def batches(task: Encoded, rows: int, seed: int) -> Iterator[list[tuple[list[int], int]]]:
    """Exercises for step after step, each once before any comes again."""
    rng = random.Random(f"tune {seed}")
    ahead: list[tuple[list[int], int]] = []
    while True:
        while len(ahead) < rows:
            ahead += rng.sample(task.train, len(task.train))
        yield ahead[:rows]
        ahead = ahead[rows:]


def rows_of(task: Encoded, tokens: int) -> int:
    """Exercises that hold about so many tokens."""
    return max(1, round(tokens / statistics.fmean(len(ids) for ids, _ in task.train)))


def held_out_batches(task: Encoded, size: int = 32) -> list[dict[str, Tensor]]:
    rows = sorted(task.held_out, key=lambda row: len(row[0]))
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


@torch.no_grad()
def choices_on(model: nn.Module, balancer: phb.PhiBalancer, task: Encoded) -> list[Tensor]:
    """The experts `(T, k)` of each layer for the tokens of the held-out exercises, padding left out."""
    was_training = model.training
    model.eval()
    by_batch = []
    for batch in held_out_batches(task):
        with recorded_choices(balancer) as chosen:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        by_batch.append([layer[batch["attention_mask"].bool().reshape(-1)] for layer in chosen])
    model.train(was_training)
    return [torch.cat(layer) for layer in zip(*by_batch)]


@torch.no_grad()
def examine(
    model: nn.Module, balancer: phb.PhiBalancer, task: Encoded, material: Material, before: list[Tensor]
) -> dict[str, float]:
    """
    Loss, score and balance on the held-out exercises, where the base chose the experts `before`; loss and balance on the text
    of the bases.
    """
    model.eval()
    total = count = 0.0
    for batch in held_out_batches(task):
        tokens = int((batch["labels"] != IGNORED).sum())
        total, count = total + float(model(**batch).loss) * tokens, count + tokens
    figures = {"loss": total / count}
    if task.grade:
        figures["score"] = score(model, task, material.load_tokenizer())
    chosen = choices_on(model, balancer, task)
    figures["rerouted"] = changed_share(before, chosen)
    num_experts = balancer.sites[0].num_experts
    loads = torch.stack([torch.bincount(layer.reshape(-1), minlength=num_experts) for layer in chosen])
    figures["max_vio_global"] = float(max_vio(loads.float()).mean())
    own, _ = examine_text(model, balancer, material.validation, rows=8)
    figures |= {f"base_{name}": own[name] for name in own if name.startswith("loss")}
    return {**figures, "base_max_vio": own["max_vio_global"], "domain_information": own["domain_information"]}
