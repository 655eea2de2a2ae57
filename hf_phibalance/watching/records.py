"""
The file `moe.jsonl` of a watched run: one JSON object a line, appended and never rewritten, so a killed run leaves it readable.

| line | when |
|---|---|
| `{"run": {"step", "model", "model_type", "method", "versions", "routers"}}` | a run starts, or resumes from `step` |
| `{"step", "steps", "tokens", "loss", "layers": {router: figures}}` | at each log; the figures are those of [`layer_figures`] |
| `{"step", "alert": {"kind", "layer", "experts", "reason", "remedy"}}` | an alert begins |

Shapes: L routers, E experts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import parse_json
from ..maths import DEAD_THRESHOLD, max_vio, noise_floor, normalised_entropy, relative_load
from ..routers import RouterSite


RECORDS_NAME = "moe.jsonl"
COLD_THRESHOLD = 0.5  # experts with less than half of the fair share are cold; dead ones are among them
CONFIDENCE = ("top1_probability", "chosen_probability", "entropy_bits")  # means over tokens
PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RANKS = 8  # of expert parallelism, in `busiest_rank_of_8`


@dataclass
class Records:
    """
    What a run has written.

    Args:
        run (`dict`): the newest `run` line, empty if there is none.
        rows (`list[dict]`): the lines of the logs.
        alerts (`list[dict]`): the lines of the alerts.
    """

    run: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)


def read_records(path: str | os.PathLike) -> Records:
    """
    Reads `moe.jsonl`, also while it is being written. A line that is not finished, or was left unfinished by a killed run, is
    ignored, and so are lines of other programs. Where a run resumed from step N, what it had written of later steps is dropped; where
    a run of other routers began, everything before.

    Args:
        path (`str` or `os.PathLike`): the file, or its folder.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    found = Records()
    for line in (path / RECORDS_NAME if path.is_dir() else path).read_bytes().split(b"\n"):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        run = record.get("run")
        if isinstance(run, dict) and {"step", "routers"} <= run.keys():
            step = run["step"] if run["routers"] == found.run.get("routers") else -1
            found.run = run
            found.rows = [row for row in found.rows if row["step"] <= step]
            found.alerts = [alert for alert in found.alerts if alert["step"] <= step]
        elif "step" in record and ("layers" in record or "alert" in record):
            (found.alerts if "alert" in record else found.rows).append(record)
    return found


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends a line to `moe.jsonl`, unbuffered. Floats get 5 digits; NaN and infinity become null."""
    line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line  # a killed run has left a line unfinished
        file.write(line)


def plain(value: Any) -> Any:
    """Returns `value` as it is written."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def layer_figures(
    sites: Sequence[RouterSite], load_LE: Tensor, probs_LE: Tensor, confidence_L4: Tensor
) -> dict[str, dict[str, Any]]:
    """
    Returns the figures of each router over some steps, by its name.

    Args:
        sites (`Sequence[RouterSite]`): the L routers.
        load_LE (`torch.Tensor` of shape `(L, E)`): how often each expert was chosen.
        probs_LE (`torch.Tensor` of shape `(L, E)`): sums over tokens of the routing probabilities.
        confidence_L4 (`torch.Tensor` of shape `(L, 4)`): sums over some of the tokens of `CONFIDENCE`, and their number.

    Returns:
        `dict`: for each router the keys of the table in `recipes/guides/WATCHING.md`. `busiest_rank_of_8` (each rank has a block of
        neighbouring experts) is left out if 8 does not divide E; `confidence` if it was not measured.
    """
    load_LE, probs_LE, confidence_L4 = (sums.double().cpu() for sums in (load_LE, probs_LE, confidence_L4))
    found, start = {}, 0
    for (experts, top_k), group in groupby(sites, lambda site: (site.num_experts, site.top_k)):
        block = list(group)
        rows = slice(start, start + len(block))
        start += len(block)
        load, probs = load_LE[rows, :experts], probs_LE[rows, :experts]
        relative = relative_load(load)
        columns = {
            "load": load.long(),
            "probs": probs / probs.sum(-1, keepdim=True).clamp(min=1e-30),
            "max_vio": max_vio(load),
            "noise_floor": noise_floor(experts, top_k, (load.sum(-1) / top_k).clamp(min=1)),
            "entropy": normalised_entropy(load),
            "dead": (relative < DEAD_THRESHOLD).double().mean(-1),
            "cold": (relative < COLD_THRESHOLD).double().mean(-1),
            "percentiles": relative.quantile(torch.tensor(PERCENTILES).double(), dim=-1).t(),
        }
        if experts % RANKS == 0:
            columns["busiest_rank_of_8"] = relative.view(len(block), RANKS, -1).mean(-1).amax(-1)
        values = {name: column.tolist() for name, column in columns.items()}
        for index, site in enumerate(block):
            found[site.name] = {name: column[index] for name, column in values.items()}
            *sums, tokens = confidence_L4[rows][index].tolist()
            if tokens:
                found[site.name]["confidence"] = {name: total / tokens for name, total in zip(CONFIDENCE, sums)}
    return found
