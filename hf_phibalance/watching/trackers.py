"""Shows loads and alerts in TensorBoard, Weights & Biases and trackio. Imports none of them: uses those that are running."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np

from ..files import layer_labels
from ..maths import DEAD_THRESHOLD


COLUMNS = ("max_vio", "noise_floor", "entropy", "dead", "cold", "busiest_rank_of_8")
# colours of a load of 0, 0.5, 1, 1.5 and 2 times the fair share: those of the other pictures of expert load, matplotlib's "RdBu_r"
STOPS = np.array([[5, 48, 97], [109, 173, 209], [247, 247, 247], [229, 130, 103], [103, 0, 31]])
DEAD = np.array([0, 0, 0])
WIDTH = 640  # of the picture in pixels, about


def running_trackers() -> dict[str, Any]:
    """Returns the runs of Weights & Biases and trackio that are active in this process."""
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
    found = {"wandb": getattr(wandb, "run", None)}
    if trackio is not None and trackio.context_vars.current_run.get() is not None:
        found["trackio"] = trackio
    return {name: run for name, run in found.items() if run is not None}


def show_loads(row: dict[str, Any], writer: Any = None, in_trainer: bool = False) -> None:
    """
    Shows a row of `moe.jsonl`: histograms and a picture in TensorBoard, a table and the picture in Weights & Biases, a table in trackio.

    Args:
        row (`dict`): the row.
        writer (`SummaryWriter`, *optional*): TensorBoard's.
        in_trainer (`bool`, *optional*, defaults to `False`):
            Whether a Trainer has logged this step already. Otherwise the loop's own `log` comes after this, with the same step.
    """
    trackers = running_trackers()
    if writer is None and not trackers:
        return
    step, labels = row["step"], layer_labels(list(row["layers"]))
    columns = [name for name in COLUMNS if any(name in figures for figures in row["layers"].values())]
    table = [
        [label, *(figures.get(name) for name in columns)] for label, figures in zip(labels, row["layers"].values())
    ]
    loads = [np.array(figures["load"]) / max(np.mean(figures["load"]), 1e-30) for figures in row["layers"].values()]
    has_pictures = importlib.util.find_spec("PIL") is not None
    if writer is not None:
        for label, load in zip(labels, loads):
            writer.add_histogram(f"moe/load/{label}", load, step)
        if has_pictures:
            writer.add_image("moe/loads", picture(loads), step, dataformats="HWC")
        writer.flush()
    own = {"train/global_step": step} if in_trainer else {}
    if "wandb" in trackers:
        wandb = sys.modules["wandb"]
        shown = {"moe/layers": wandb.Table(columns=["layer", *columns], data=table)}
        if has_pictures:
            caption = "a row is a layer, a column an expert; white: fair share, dark red: twice, black: dead"
            shown["moe/loads"] = wandb.Image(picture(loads), caption=caption)
        trackers["wandb"].log(own | shown, commit=in_trainer)
    if "trackio" in trackers:
        trackio = trackers["trackio"]
        trackio.log(own | {"moe/layers": trackio.Table(columns=["layer", *columns], data=table)})


def alert_trackers(alert: dict[str, Any], text: str) -> None:
    """Sends an alert to Weights & Biases and trackio, if they run."""
    title = f"{alert['kind']}: {alert['layer']}"
    trackers = running_trackers()
    if "wandb" in trackers:
        trackers["wandb"].alert(title=title, text=text, level="WARN")
    if "trackio" in trackers:
        trackers["trackio"].alert(title=title, text=text)


def picture(loads: list[np.ndarray]) -> np.ndarray:
    """Returns loads over the fair share as a picture `(height, width, 3)` of bytes: a row per layer, a column per expert."""
    experts = max(map(len, loads))
    size = min(max(WIDTH // experts, 4), 32)
    cells = np.full((len(loads), experts, 3), 255.0)
    for row, load in zip(cells, loads):
        level = np.clip(load, 0, 2) / 2 * (len(STOPS) - 1)
        low = np.minimum(level.astype(int), len(STOPS) - 2)
        row[: len(load)] = STOPS[low] + (STOPS[low + 1] - STOPS[low]) * (level - low)[:, None]
        row[: len(load)][load < DEAD_THRESHOLD] = DEAD
    pixels = cells.astype(np.uint8).repeat(size, 0).repeat(size, 1)
    pixels[size - 1 :: size] = pixels[:, size - 1 :: size] = 255  # lines between cells
    return pixels
