"""Explains why a step received another coefficient of the built-in loss than was declared: one finding for each reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .report import PRECISE, ROUGH, Check, Coefficient, DoctorReport
from .stock import Stock


LARGE = 0.1  # coefficients that models were published with are mostly between 0.0001 and 0.02
HIDDEN = 0.5  # share of the mean imbalance of the layers that the pooled loss must show
UNEVEN = 0.1  # imbalance of a layer, relative to top_k, below which there is nothing to hide
VERDICTS = {
    "ok": "The declared coefficient arrives.",
    "warning": "Read the remedies.",
    "problem": "The declared coefficient does not arrive.",
}
PATCH = "phb.patch(model, {'coef': 0.01})"


@dataclass(frozen=True)
class Declared:
    """Where a coefficient of the built-in loss is declared, and by what kind of training."""

    by_model: float  # the coefficient that the model multiplies its loss by
    is_on: bool  # the config's `output_router_logits`
    sources: dict[str, float]  # by where it is written; the first one counts
    by_trainer: float | None = None  # coefficient of a loss that the trainer adds
    is_default: bool = False  # nobody set it, and the trainer switched the loss on
    trainer: str = "the loop"  # name of its class
    model: str = "the model"  # name of its class

    @property
    def coefficient(self) -> float:
        return next(iter(self.sources.values()), 0.0)


@dataclass(frozen=True)
class AuditReport(DoctorReport):
    """
    The report of [`audit`]; `print` it. Has what a [`DoctorReport`] has, and:

    Args:
        declared (`float`): the coefficient that was declared; 0 if there is none.
        received (`float`, *optional*): the coefficient that arrived at the routers' logits; `None` if nothing was measured.
        sources (`dict[str, float]`): where a coefficient is written, and its value. The first one is `declared`.
        pooled (`float`): the built-in loss of the step's tokens, with all layers pooled. `top_k` is balance.
        layers (`dict[str, float]`): the same loss of each layer alone.
    """

    declared: float = 0.0
    received: float | None = None
    sources: dict[str, float] = field(default_factory=dict)
    pooled: float = math.nan
    layers: dict[str, float] = field(default_factory=dict)
    title, verdicts = "Auxiliary loss", VERDICTS

    @property
    def ratio(self) -> float | None:
        """Received over declared coefficient; `None` if one of them is missing."""
        return None if self.coefficient is None else self.coefficient.ratio

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        own = {name: getattr(self, name) for name in ("declared", "received", "ratio", "sources", "pooled", "layers")}
        return super().to_dict() | own


def explain(seen: Stock, declared: Declared, measured: str, model: dict[str, Any]) -> AuditReport:
    """Returns the report of a step: what it received, and every reason why that is not what was declared."""
    coefficient = None
    if declared.coefficient:
        ratio = seen.received / declared.coefficient
        coefficient = Coefficient(
            declared.coefficient, ratio, seen.residual, {}, "the logits of the routers", seen.is_precise
        )
    checks = [Check(*parts) for parts in _all(seen, declared, coefficient)]
    shown = {"declared": declared.coefficient, "received": seen.received, "sources": declared.sources}
    return AuditReport(checks, measured, coefficient, model, **shown, pooled=seen.pooled, layers=seen.layers)


def _all(seen: Stock, declared: Declared, coefficient: Coefficient | None) -> Iterator[tuple[str, Any, str, str]]:
    written = ", ".join(f"{name}={value:g}" for name, value in declared.sources.items()) or "nowhere"
    yield "declared", "ok", written, ""
    if coefficient is None:
        found = "no coefficient is declared" + (f", but {seen.received:.3g} arrives" if seen.received else "")
        yield "coefficient", "warning" if seen.received else "ok", found, ""
        if not seen.computes:
            found = f"{declared.model} returns no router logits to a loss, and computes no auxiliary loss"
            status = "warning" if declared.is_on else "ok"
            yield (
                "router logits",
                status,
                found,
                f"{PATCH}, which needs no router logits from the model" if declared.is_on else "",
            )
    else:
        exact = abs(coefficient.ratio - 1) <= coefficient.tolerance
        is_off = seen.received == 0 and not declared.is_on and declared.by_trainer is None
        found = f"{seen.received:.6g} received of {coefficient.declared:g} declared, ratio {coefficient.ratio:.4f}"
        yield "coefficient", "ok" if exact else "warning" if is_off else "problem", found, ""
        if seen.received == 0:
            yield _missing(seen, declared)
        elif not exact:
            yield from _factors(seen, declared)
    if declared.is_default and seen.received:
        yield (
            "default",
            "warning",
            f"{declared.trainer} switched the loss on by itself, with {declared.coefficient:g}: no argument sets it",
            "router_aux_loss_coef=... in its arguments; 0.0 switches it off",
        )
    if abs(declared.coefficient) >= LARGE and seen.received:
        yield (
            "size",
            "warning",
            f"{declared.coefficient:g} is large: most models were trained with 0.0001 to 0.02. GPT-OSS has 0.9 in its config",
            "router_aux_loss_coef=0.001 or so, where it is declared",
        )
    if seen.received:
        yield from _details(seen, declared)
    yield from _pooled(seen)


def _missing(seen: Stock, declared: Declared) -> tuple[str, Any, str, str]:
    """Returns why nothing arrives."""
    model, trainer = declared.model, declared.trainer
    if not seen.computes and not declared.is_on and declared.by_trainer is None:
        return (
            "switched off",
            "warning",
            "the model computes no auxiliary loss, because output_router_logits=False in its config",
            "from_pretrained(..., output_router_logits=True)",
        )
    if not seen.computes:
        return (
            "router logits",
            "problem",
            f"{model} returns no router logits to its loss and computes no auxiliary loss, so the coefficient does nothing",
            f"{PATCH}, which needs no router logits from the model",
        )
    if seen.is_reentrant and not seen.aux_has_path:
        return (
            "checkpointing",
            "problem",
            "reentrant checkpointing runs the routers without gradients first, and the auxiliary loss is computed from these logits",
            "gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    if not seen.aux_has_path:
        return (
            "gradient path",
            "problem",
            "the auxiliary loss has no gradient path: the routers, and all layers below them, are frozen",
            "train the routers, for example by phb.lora_config(model, router='lora')",
        )
    return (
        "dropped",
        "problem",
        f"the model computes the auxiliary loss, but it is no part of the loss that {trainer} trains on",
        f"add coefficient * outputs.aux_loss in {trainer}.compute_loss, or {PATCH}",
    )


def _factors(seen: Stock, declared: Declared) -> Iterator[tuple[str, Any, str, str]]:
    """Yields the factors between the received and the declared coefficient."""
    tolerance = 10 * (PRECISE if seen.is_precise else ROUGH)
    by_model, by_trainer = seen.from_loss * declared.by_model, seen.from_aux - seen.from_loss * declared.by_model
    both = seen.computes and min(abs(by_model), abs(by_trainer)) > 0.01 * abs(seen.from_aux)
    wanted = declared.coefficient
    if both:
        yield (
            "two sources",
            "problem",
            f"both add it: {declared.model} {by_model:.3g} in its loss, {declared.trainer} {by_trainer:.3g} on top",
            "set one of them to 0: model.router_aux_loss_coef, or the trainer's argument",
        )
        wanted *= seen.from_aux / by_model
    elif by_model and abs(declared.by_model / wanted - 1) > tolerance:
        yield (
            "copied",
            "problem",
            f"the model multiplies by {declared.by_model:g}, which it copied when it was built; later changes of its config do nothing",
            "from_pretrained(..., router_aux_loss_coef=...), or set model.router_aux_loss_coef",
        )
        wanted = declared.by_model
    left, forwards, ranks = seen.received / wanted if wanted else 1.0, seen.forwards, seen.ranks
    parts = {
        f"{forwards} micro-batches": forwards,
        f"{ranks} ranks": ranks,
        f"{forwards} micro-batches and {ranks} ranks": forwards * ranks,
    }
    for name, size in parts.items():
        if size == 1 or (ranks == 1 and "and" in name):
            continue
        if math.isclose(left, size, rel_tol=tolerance):
            yield (
                "accumulation and ranks",
                "problem",
                f"times {size}: the loss of each micro-batch is added in full and then summed over {name}",
                f"divide the coefficient by {size}, or use a trainer that does (SFTTrainer of TRL)",
            )
            return
        if math.isclose(left, 1 / size, rel_tol=tolerance):
            yield (
                "accumulation and ranks",
                "problem",
                f"divided by {size}: the loss is averaged once more over {name}",
                f"multiply the coefficient by {size}",
            )
            return
    if abs(left - 1) > tolerance:
        yield (
            "scale",
            "problem",
            f"times {left:.4g}, for a reason that was not found",
            f"{PATCH}: its coefficient does not depend on the loop",
        )


def _details(seen: Stock, declared: Declared) -> Iterator[tuple[str, Any, str, str]]:
    """Yields what is particular about the loss that arrives."""
    if seen.padding and seen.on_padding > 1e-6:
        yield (
            "padding",
            "warning",
            f"counted: {seen.padding / seen.positions:.1%} of the positions are padding, and {seen.on_padding:.1%} of the squared "
            "gradient is there",
            "give the model the attention_mask of each batch",
        )
    elif seen.padding:
        yield "padding", "ok", f"not counted: {seen.padding:,} of {seen.positions:,} positions", ""
    parts = seen.forwards * seen.ranks
    if parts > 1 and seen.counts == "step":
        yield "counts", "ok", f"of the whole step, {parts} micro-batches", ""
    elif parts > 1:
        yield (
            "counts",
            "warning",
            f"of each micro-batch alone, about {seen.positions / parts:,.0f} positions, not of the step's {seen.positions:,}: each is "
            "balanced by itself",
            f"larger micro-batches, or {PATCH}, which averages loads over steps",
        )
    if seen.residual > 0.05:
        yield (
            "other losses",
            "warning",
            f"{seen.residual:.0%} of the gradient that comes from outside the routers is not this loss",
            "look for another loss of the router logits, such as a z-loss",
        )
    if not seen.learns:
        yield (
            "routers that learn",
            "warning",
            "all routers are frozen, so the loss reaches only what lies below them",
            "train the routers, for example by phb.lora_config(model, router='lora')",
        )


def _pooled(seen: Stock) -> Iterator[tuple[str, Any, str, str]]:
    """Yields what pooling the layers hides."""
    if len(seen.layers) < 2:
        return
    worst = max(seen.layers, key=lambda name: seen.layers[name])
    mean = sum(seen.layers.values()) / len(seen.layers)
    pooled, each = (value / seen.top_k - 1 for value in (seen.pooled, mean))
    hides = each > UNEVEN and pooled < HIDDEN * each
    found = (
        f"{seen.pooled:.4g} with all layers pooled, {mean:.4g} in the mean of the layers, {seen.layers[worst]:.4g} in {worst} "
        f"({seen.top_k} is balance)"
    )
    remedy = f"phibalance inspect shows each layer; {PATCH} balances each by itself" if hides else ""
    yield "pooled layers", "warning" if hides else "ok", f"hides imbalance: {found}" if hides else found, remedy
