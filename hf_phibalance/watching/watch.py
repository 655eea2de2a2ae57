"""Follows the routers of one model: sums over optimizer steps stay on the device until they are logged."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..balancing import Counts, Figures, PhiBalancer, describe_router, get_balancer
from ..files import public_name, quoted, versions
from ..routers import canonical_name
from .alerts import Alerts, RouterAlert, Thresholds, text_of
from .records import RECORDS_NAME, append_record, layer_figures, plain, read_records
from .trackers import alert_trackers, show_loads


logger = logging.get_logger(__name__)
SAMPLED = 1024  # weights of a router that are compared: the share that has moved is then known to 2 %


class Watch:
    """
    Watches the routers of a model in training; [`watch`] makes it. In a Trainer it works by itself. In a loop of your own, call
    [`~Watch.log`] when you log.

    Args:
        model (`torch.nn.Module`): a patched model.
        output_dir (`str` or `os.PathLike`, *optional*): where `moe.jsonl` is written.
        on_alert (`str`, *optional*, defaults to `"log"`): `"log"` or `"raise"`.
        thresholds (`Thresholds`, *optional*): when an alert begins.

    Attributes:
        path (`Path`, *optional*): the file `moe.jsonl`.
        alerts (`list[dict]`): the alerts of this process, as in `moe.jsonl`.
    """

    def __init__(
        self,
        model: nn.Module,
        output_dir: str | os.PathLike | None = None,
        on_alert: str = "log",
        thresholds: Thresholds | None = None,
    ) -> None:
        self.path = None if output_dir is None else Path(output_dir, RECORDS_NAME)
        self.on_alert, self.thresholds = on_alert, thresholds or Thresholds()
        self.alerts: list[dict[str, Any]] = []
        self.in_trainer = False  # whether the callback of balancing, instead of `log`, returns the metrics
        self.on_stop: list[Callable[[], Any]] = []
        self._step = 0  # of the last log
        self._balancer: PhiBalancer | None = None
        self.follow(model)
        self.balancer.measures_confidence = True

    # ------------------------------------------------------------------ the steps

    @property
    def balancer(self) -> PhiBalancer:
        """The balancer of the watched model. Raises `RuntimeError` if it is watched no longer."""
        if self._balancer is None or self._balancer.watcher is None:
            raise RuntimeError("This watch was stopped, or its model was unpatched. Call phb.watch again.")
        return self._balancer

    @property
    def is_stopped(self) -> bool:
        """Whether `stop()` was called."""
        return self._balancer is None

    def follows(self, model: nn.Module) -> bool:
        """Whether `model` has not been patched anew since [`~Watch.follow`]."""
        return get_balancer(model) is self._balancer

    def follow(self, model: nn.Module) -> None:
        """Watches `model` from its next step on. A former watch of it is stopped."""
        balancer = get_balancer(model)
        if self._balancer is not None and self._balancer is not balancer:
            self._balancer.watcher = None
        self._balancer, balancer.watcher = balancer, self._add
        self._finder: Alerts | None = None  # made at the first log, or when training begins
        self._weights: list[_Weights] = []  # of each router, from the first step on
        self._gradients: list[Tensor | None] = []  # () for each router: whether a gradient came, in any measured step
        self._since = 0  # steps since `_weights` were read
        self._forget()

    def _forget(self) -> None:
        self._sums: Tensor | None = None
        self._figures: Figures | None = None
        self._steps = 0

    @torch.no_grad()
    def _add(self, counts: Counts) -> None:
        """Called at the end of each optimizer step, with its counts over all ranks."""
        balancer = self.balancer
        own = counts.flat[: counts.flat.numel() - counts.extra.numel()]
        if self._sums is None:
            exact = torch.float32 if own.device.type == "mps" else torch.float64
            self._sums = torch.zeros_like(own, dtype=exact)
        self._sums += torch.where(counts.skipped > 0, 0.0, own)
        self._steps += 1
        if not self.in_trainer:
            figures = Figures.of(counts, balancer.sites)
            self._figures = figures if self._figures is None else self._figures + figures
        if not self._weights:  # not before, since wrappers may replace the parameters
            self._weights, self._since = read_weights(balancer), 0
        else:
            self._since += 1
        if balancer.measures_confidence:  # and with it, whether a gradient reaches the routers
            found = [weights.has_gradient() for weights in self._weights]
            before = self._gradients or [None] * len(found)
            self._gradients = [now if then is None or now is None else now | then for now, then in zip(found, before)]
            balancer.measures_confidence = False

    # ------------------------------------------------------------------ the logs

    def log(self, step: int | None = None) -> dict[str, float]:
        """
        Writes the steps since the last log to `moe.jsonl`, and finds alerts. For a loop of your own: call it on every rank. It waits for
        the device. The next optimizer step then measures confidence for the next log.

        Args:
            step (`int`, *optional*): optimizer steps so far, over all epochs. Defaults to those since [`watch`], so pass it if you resume.

        Returns:
            `dict[str, float]`: `moe/...`, means over the steps since the last log, for your tracker. Empty if there was no step.

        Raises:
            RouterAlert: if an alert begins, with `on_alert="raise"`.
            ValueError: if `step` is not after that of the last log.
            RuntimeError: if watching was stopped.
        """
        balancer, figures, steps = self.balancer, self._figures, self._steps
        if figures is None:
            return {}
        step = self._step + steps if step is None else operator.index(step)
        if self._finder is not None and step <= self._step:
            raise ValueError(
                f"`step` must be after that of the last log, {self._step}, got {step}: count optimizer steps over all epochs."
            )
        if self._finder is None:
            self.begin(max(step - steps, 0))
        balancer.check_finite()
        values = {f"moe/{name}": value for name, value in balancer.metrics(figures=figures).items()}
        try:
            self.record(step)
        finally:
            balancer.measures_confidence = True
        return values

    def begin(self, step: int) -> None:
        """Writes the line of a run that starts or resumes at `step`, and takes up what `moe.jsonl` has of it before."""
        root: Any = self.balancer.root
        config = getattr(root, "config", None)
        run: dict[str, Any] = {
            "step": step,
            "model": public_name(getattr(config, "_name_or_path", "") or type(root).__name__),
            "model_type": getattr(config, "model_type", ""),
            "method": self.balancer.config.method,
            "versions": versions(),
            "routers": [
                {"name": site.name, "experts": site.num_experts, "top_k": site.top_k, "scoring": site.scoring}
                for site in self.balancer.sites
            ],
        }
        self._finder = Alerts(self.thresholds, run["routers"], run["method"])
        self._write({"run": run})
        if step and self.path is not None and self.path.is_file():
            known = {site.name for site in self.balancer.sites}
            for row in read_records(self.path).rows:
                if (
                    row["step"] <= step and row["layers"].keys() == known
                ):  # the first rank may not have written `run` yet
                    self._finder.add(row)
        self._step = step

    def record(self, step: int, loss: float | None = None, writer: Any = None, reads_weights: bool = True) -> None:
        """
        Writes the row of the steps since the last log, shows it in the trackers and finds alerts. Does nothing if there was no step.
        `reads_weights=False` where the weights are no longer those of the last step.

        Raises:
            RouterAlert: if an alert begins, with `on_alert="raise"`.
        """
        if self._sums is None or self._finder is None:
            return
        balancer = self.balancer
        if self._finder.method != balancer.config.method:  # patch() has changed it
            self.begin(step - self._steps)
        sums, steps, (layers, experts) = self._sums.cpu(), self._steps, balancer.duals.shape
        self._forget()
        self._step = step
        counted, confidence, totals = sums.split([2 * layers * experts, 4 * layers, 5])
        probs_LE, load_LE = counted.view(2, layers, experts)
        figures = layer_figures(balancer.sites, load_LE, probs_LE, confidence.view(layers, 4))
        for weights, gradient, site in zip(self._weights if reads_weights else (), self._gradients, balancer.sites):
            figures[site.name]["router"] = weights.describe(gradient, self._since)
        row = {"step": step, "steps": steps, "tokens": int(totals[0]) if totals[0].isfinite() else None, "loss": loss}
        row = plain({name: value for name, value in row.items() if value is not None} | {"layers": figures})
        began: list[dict[str, Any]] = [{"step": step, "alert": alert} for alert in self._finder.add(row)]
        self.alerts += began
        if _is_first():
            self._write(row)
            show_loads(row, writer, self.in_trainer)
            for alert in began:
                self._write(alert)
                text = text_of(alert["alert"])
                logger.warning(f"step {step}: {text}")
                alert_trackers(alert["alert"], text)
        if began and self.on_alert == "raise":
            raise RouterAlert([alert["alert"] for alert in began])

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is None or not _is_first():
            return
        try:
            append_record(self.path, record)
        except OSError as error:  # a full disk must not end a training that is only watched
            logger.warning_once(
                f"{quoted(str(self.path))} cannot be written ({error}), so its figures are lost until it can. "
                "The training goes on. Free space on its disk, or make it a writable file."
            )

    def stop(self) -> None:
        """Stops watching, and undoes what [`watch`] has changed in model and trainer. The file stays."""
        if self._balancer is not None:
            self._balancer.watcher, self._balancer.measures_confidence = None, False
            self._balancer = None
        self._forget()
        while self.on_stop:
            self.on_stop.pop()()


def _is_first() -> bool:
    """Whether this is the rank that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


# ---------------------------------------------------------------------- the weights of routers


@dataclass
class _Weights:
    """How a router learns (`"full"`, `"lora"` or `"frozen"`), how its experts do, and some of its trained weights at some step."""

    learns: str
    experts: str | None
    parameters: list[nn.Parameter]
    before: Tensor

    def sample(self) -> Tensor:
        """Returns about `SAMPLED` of the trained weights of this rank."""
        local = [_local(p.detach()).flatten() for p in self.parameters]
        stride = sum(p.numel() for p in local) // SAMPLED | 1  # odd, so as not to take the same columns of all rows
        return torch.cat([p[::stride].float() for p in local]) if local else torch.zeros(0)

    def has_gradient(self) -> Tensor | None:
        """Whether any trained weight has a gradient that is not 0, `()`. `None` without any, or if the engine keeps them elsewhere."""
        found = [_local(p.grad).any() for p in self.parameters if p.grad is not None]
        return torch.stack(found).any() if found else None

    def describe(self, gradient: Tensor | None, since: int) -> dict[str, Any]:
        """Returns what a row of `moe.jsonl` says of the weights, `since` steps after they were read."""
        found: dict[str, Any] = {"learns": self.learns, "experts": self.experts}
        if self.before.numel():
            unchanged = float((self.sample() == self.before).double().mean())
            dtype = str(self.parameters[0].dtype).removeprefix("torch.")
            came = None if gradient is None else bool(gradient)
            found |= {"dtype": dtype, "gradient": came, "unchanged": unchanged, "since": since}
        return found


def read_weights(balancer: PhiBalancer) -> list[_Weights]:
    """Reads the trained weights of all routers, adapters included."""
    parameters = [(canonical_name(name), p) for name, p in balancer.root.named_parameters() if p.requires_grad]
    found = []
    for site in balancer.sites:
        learning = describe_router(site.name, balancer.root)
        own = [p for name, p in parameters if name.startswith(f"{site.name}.")]
        weights = _Weights(learning.how, learning.experts, own, torch.zeros(0))
        weights.before = weights.sample()
        found.append(weights)
    return found


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor that is spread over ranks."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
