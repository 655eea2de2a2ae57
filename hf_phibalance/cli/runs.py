"""A watched run: its records as one screen of the terminal, and as an [`Inspection`] for the page of `inspect`."""

from __future__ import annotations

import contextlib
import math
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..files import layer_labels, printable, public_name, quoted
from ..inspection import Inspection, Layer, load_strip
from ..maths import relative_load
from ..watching import CONFIDENCE, RECORDS_NAME, Records, read_records


BARS = "▁▂▃▄▅▆▇█"
POINTS = 200  # most points of a line on the page
STRETCHES = 3  # of the run, compared on the page
NEWEST = 3  # number of alerts on a screen that must fit the terminal
PAUSE = 1.0  # seconds between two looks at the file
LABEL = 24  # most characters of a label in a table


class Run:
    """The records of a watched run in `folder`. Raises `ValueError` if there are none."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder, RECORDS_NAME)
        exists = self.path.is_file()
        self.size = self.path.stat().st_size if exists else 0  # before it grows
        records = read_records(self.path) if exists else Records()
        if not records.run:
            raise ValueError(
                f"there is no watched run in {quoted(folder)} ({RECORDS_NAME}): name the output_dir of a training that calls "
                "phb.watch(trainer) before trainer.train()."
            )
        self.about, self.rows = records.run, []
        self.routers = {router["name"]: router for router in self.about["routers"]}
        for row in records.rows:
            layers = {name: layer for name, layer in row["layers"].items() if self._has_tokens(name, layer["load"])}
            if layers:
                self.rows.append(row | {"layers": layers})
        self.labels = dict(zip(self.routers, map(printable, layer_labels(list(self.routers)))))
        own = [record for record in records.alerts if record["alert"]["layer"] in self.routers]
        self.alerts = [self._in_words(record["step"], record["alert"]) for record in own]
        shape = [sorted({router[name] for router in self.about["routers"]}) for name in ("experts", "top_k")]
        experts, top_k = (" or ".join(map(str, numbers)) for numbers in shape)
        self.description = printable(
            f"{self.about['model_type']}, {len(self.routers)} routers of {experts} experts, top-{top_k}; "
            f"method: {self.about['method']}"
        )

    def _has_tokens(self, name: str, load: list[int]) -> bool:
        """Whether `name` with `load` is a router of this run (lines of another model may stand among them) that got tokens."""
        return name in self.routers and len(load) == self.routers[name]["experts"] and any(load)

    def _in_words(self, step: int, alert: dict[str, Any]) -> dict[str, str]:
        """Returns title, reason and remedy of an alert."""
        title = f"step {step}, {self.labels[alert['layer']]}: {alert['kind'].replace('_', ' ')}"
        reason = alert["reason"][:1].upper() + alert["reason"][1:]
        return {"title": title, "reason": printable(reason), "remedy": printable(alert["remedy"])}

    def curves(self, points: int) -> dict[str, list[float]]:
        """
        Returns `steps`, `max_vio`, `floor` and `loss` over the run, and as `worst` the greatest MaxVio of a layer. Successive records are
        joined to at most `points` numbers.
        """
        size = math.ceil(len(self.rows) / points)
        found: dict[str, list[float]] = {name: [] for name in ("steps", "max_vio", "worst", "floor", "loss")}
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            layers = [layer for row in rows for layer in row["layers"].values()]
            found["steps"].append(rows[-1]["step"])
            found["max_vio"].append(fmean(layer["max_vio"] for layer in layers))
            found["worst"].append(max(layer["max_vio"] for layer in layers))
            found["floor"].append(fmean(layer["noise_floor"] for layer in layers))
            found["loss"].append(fmean(_number(row.get("loss")) for row in rows))
        return found

    def inspection(self) -> Inspection:
        """
        Returns the loads as an inspection, whose domains are stretches of the run. Its halves are every other record.

        Raises:
            ValueError: if no step was logged yet.
        """
        if not self.rows:
            raise ValueError(f"no step is in {quoted(str(self.path))} yet: wait for the first log of the training.")
        number = max(min(STRETCHES, len(self.rows) // 2), 1)
        edges = [len(self.rows) * index // number for index in range(number + 1)]
        parts = [self.rows[start:stop] for start, stop in pairwise(edges)]
        domains = {
            f"steps {part[0]['step'] - part[0]['steps'] + 1}-{part[-1]['step']}": {
                "tokens": _tokens(part),
                "steps": sum(row["steps"] for row in part),
            }
            for part in parts
        }
        names = [name for name in self.routers if all(any(name in row["layers"] for row in part) for part in parts)]
        silent = [label for name, label in self.labels.items() if name not in names]
        note = f"{len(silent)} routers had stretches without tokens and are left out: {', '.join(silent[:4])}."
        model = {"name": public_name(self.about["model"]), "model_type": self.about["model_type"]}
        settings = {"method": self.about["method"], "records": len(self.rows)}
        layers = [self._layer(name, parts) for name in names]
        return Inspection(model, settings, domains, layers, [note] if silent else [])

    def _layer(self, name: str, parts: list[list[dict[str, Any]]]) -> Layer:
        """Returns the sums of a router over each of `parts`. Its confidence is NaN if it was not measured."""
        top_k, halves, sums = self.routers[name]["top_k"], [], []
        for part in parts:
            layers = [row["layers"][name] for row in part if name in row["layers"]]
            load_RE = torch.tensor([layer["load"] for layer in layers])  # R records
            halves.append(torch.stack([load_RE[::2].sum(0), load_RE[1::2].sum(0)]))
            known = [layer.get("confidence", {}) for layer in layers]
            means_R3 = torch.tensor([[_number(means.get(key)) for key in CONFIDENCE] for means in known]).double()
            weight_R3 = load_RE.sum(1, keepdim=True) * means_R3.isfinite()
            means_3 = (weight_R3 * means_R3.nan_to_num()).sum(0) / weight_R3.sum(0)
            sums.append(means_3 * load_RE.sum() / top_k)
        return Layer(name, top_k, self.routers[name]["scoring"], torch.stack(halves, 1), torch.stack(sums))

    def for_page(self) -> dict[str, Any]:
        """Returns what the page shows besides [`~Run.inspection`]."""
        curves: dict[str, Any] = {**self.curves(POINTS)}
        losses = {step: loss for step, loss in zip(curves["steps"], curves["loss"]) if math.isfinite(loss)}
        curves |= {"loss": list(losses.values()), "loss_steps": list(losses)}
        return curves | {"description": self.description, "alerts": self.alerts, "versions": self.about["versions"]}


def screen(run: Run, console: Console, height: int | None = None) -> RenderableType:
    """
    Returns the run as one screen. If it must fit into `height` lines, it has the newest alerts, and the layers that need attention:
    first those with dead experts, then those with the greatest MaxVio.
    """
    age = time.time() - run.path.stat().st_mtime
    ago = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min" if age < 7200 else f"{age / 3600:.0f} h"
    head = Text().append(printable(public_name(run.about["model"])), "bold").append(f"\n{run.description}\n")
    if not run.rows:
        return head.append(f"No step is logged yet; started {ago} ago.")
    head.append(f"step {run.rows[-1]['step']:,}, {_tokens(run.rows):,} tokens; logged {ago} ago")
    newest = run.alerts[::-1][: NEWEST if height else None]
    notes = [
        Text().append(alert["title"], "bold red").append(f"\n{alert['reason']} {alert['remedy']}") for alert in newest
    ]
    if len(newest) < len(run.alerts) or not run.alerts:
        notes.append(Text(f"{len(run.alerts) - len(newest)} earlier alerts" if newest else "No alerts", "dim"))
    layers = run.rows[-1]["layers"]
    names = list(layers)
    above = Group(head, Text(), _lines(run, console.width), Text())
    if height:
        room = height - len(console.render_lines(Group(above, *notes))) - 5  # heading, key, and the cursor's line
        each = len(console.render_lines(_layers(run, names[:1]))) - 1
        worst = sorted(names, key=lambda name: (not layers[name]["dead"], -layers[name]["max_vio"]))
        names = [name for name in names if name in worst[: max(room // each, 1)]]
    silent = len(run.routers) - len(layers)
    missing = {"other layers are not shown": len(layers) - len(names), "routers got no tokens": silent}
    key = "▄ is the fair share; dead (×) is less than 1/20 of it, cold less than 1/2"
    if any(missing.values()):
        key += "\n" + ", ".join(f"{number} {what}" for what, number in missing.items() if number)
    return Group(above, _layers(run, names), Text(key, "dim"), Text(), *notes)


def _lines(run: Run, width: int) -> Table:
    """Returns loss and MaxVio over the run, with their newest values."""
    layers, curves = run.rows[-1]["layers"], run.curves(max(width - LABEL - 24, 8))
    worst = max(layers, key=lambda name: layers[name]["max_vio"])
    mean, floor = (fmean(layer[name] for layer in layers.values()) for name in ("max_vio", "noise_floor"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(no_wrap=True)
    if "loss" in run.rows[-1]:
        table.add_row("loss", _sparkline(curves["loss"]), f"{_number(run.rows[-1]['loss']):.4g}")
    table.add_row("MaxVio", _sparkline(curves["max_vio"], 0.0), f"{mean:.3f} (chance: {floor:.3f})")
    table.add_row(
        "worst layer", _sparkline(curves["worst"], 0.0), f"{layers[worst]['max_vio']:.3f} ({_end(run.labels[worst])})"
    )
    return table


def _tokens(rows: list[dict[str, Any]]) -> int:
    """Returns the tokens of `rows`. A row with a NaN in it has no number."""
    return sum(row.get("tokens", 0) for row in rows)


def _number(value: float | None) -> float:
    """Returns a number of the records. `None` stands for one that is unknown or not finite."""
    return math.nan if value is None else value


def _sparkline(values: list[float], lowest: float | None = None) -> str:
    """Returns one bar per value, from `lowest` (by default the least value) to the greatest. `×` is not finite."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    lowest = min(finite) if lowest is None else lowest
    span = max(finite) - lowest or 1.0
    return "".join(BARS[round(7 * (value - lowest) / span)] if math.isfinite(value) else "×" for value in values)


def _layers(run: Run, names: list[str]) -> Table:
    """Returns the newest loads of the routers `names` as a table."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="italic")
    table.add_column("layer", no_wrap=True)
    for heading in ("MaxVio", "entropy", "dead", "cold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("load of each expert", overflow="fold")
    for name in names:
        layer, experts = run.rows[-1]["layers"][name], run.routers[name]["experts"]
        noise = layer["max_vio"] <= layer["noise_floor"]
        counts = [str(round(layer[kind] * experts)) for kind in ("dead", "cold")]
        strip = load_strip(relative_load(torch.tensor(layer["load"], dtype=torch.float64)).tolist())
        max_vio = Text(f"{'≈' if noise else ''}{layer['max_vio']:.3f}", "dim" if noise else "")
        table.add_row(Text(_end(run.labels[name])), max_vio, f"{layer['entropy']:.3f}", *counts, strip)
    return table


def _end(label: str) -> str:
    """Returns the end of a long label: the routers of one model differ there, and begin alike."""
    return label if len(label) <= LABEL else f"…{label[1 - LABEL :]}"


def follow(folder: str, console: Console) -> None:
    """Shows the run until Ctrl-C, as it goes on. Reading its file takes at most a tenth of the time."""
    run, pause, printed = Run(folder), PAUSE, None
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            if not console.is_dumb_terminal:
                live.update(screen(run, console, console.height), refresh=True)
            elif run is not printed:  # Live draws nothing there
                console.print(screen(run, console, console.height))
                printed = run
            time.sleep(pause)
            began = time.monotonic()
            if run.path.stat().st_size != run.size:
                run = Run(folder)
            pause = max(PAUSE, 9 * (time.monotonic() - began))
