"""
An [`Inspection`] as one HTML file that needs nothing beside itself.

Its pictures follow the reader's light or dark theme, and a few lines of script show the value under the pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import layer_labels, versions, without_paths
from ..maths import relative_load
from .figures import lift, specialisation_figures
from .findings import Inspection
from .pictures import STEPS, colour_steps, heat_svg, legend_svg, lines_svg
from .wording import HEADINGS, cutting, describe, figure_text, information_text, title


TEMPLATE = Path(__file__).with_name("page.html.jinja")
LIFT_RANGE = 1.0  # powers of two from the neutral colour to the last one, for preferences of a domain
FEWEST = 5.0  # a cell of a domain is shown only if so many tokens were to be expected in it
OPEN_LAYERS = 8  # domain-by-expert pictures that are not folded away


def html_report(inspection: Inspection, top: int = 10, command: Sequence[str] | None = None) -> str:
    """
    The page of an inspection.

    Args:
        inspection (`Inspection`): What was found.
        top (`int`, *optional*, defaults to `10`): Specialists of each domain.
        command (`Sequence[str]`, *optional*): The command line behind it.

    Returns:
        `str`: HTML that refers to nothing outside itself.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = jinja2.utils.markupsafe.Markup
    layers, scopes = inspection.layers, inspection.scopes()
    labels = layer_labels([layer.name for layer in layers])
    several = len(scopes) > 1
    figures = [inspection.layer_figures(layer) for layer in layers]
    summaries = {scope: inspection.summary(scope) for scope in scopes}
    information = [specialisation_figures(layer.halves, layer.top_k) for layer in layers] if several else []
    most = sorted(range(len(information)), key=lambda i: -information[i]["mutual_information"])[:OPEN_LAYERS]

    def loads(scope: str) -> str:
        rows = [relative_load(inspection.counts(layer, scope).double()).tolist() for layer in layers]
        return heat_svg(rows, labels, "× the fair share", cross_dead=True, caption=f"load of each expert, {scope}")

    def over_layers(name: str, what: str, floor: bool = False) -> str:
        series = {scope: [figure[scope][name] for figure in figures] for scope in scopes}
        noise = [max(figure[scope]["chance_in_text"]["max_vio"] for scope in scopes) for figure in figures]
        return lines_svg(series, labels, what, ("noise floor", noise) if floor else None)

    def table(scope: str) -> list[dict[str, Any]]:
        return [
            {
                "label": label,
                "name": layer.name,
                "experts": layer.experts,
                "top_k": layer.top_k,
                "cells": [figure_text(figure[scope], name) for name in HEADINGS],
                "dead": figure[scope]["dead"],
                "extremes": (figure[scope]["min_relative_load"], figure[scope]["max_relative_load"]),
                "floor": figure[scope]["chance_in_text"]["max_vio"],
                "effect": figure[scope]["design_effect"],
            }
            for label, layer, figure in zip(labels, layers, figures)
        ]

    pictures = {
        "loads": {scope: loads(scope) for scope in scopes},
        "max_vio": over_layers("max_vio", "MaxVio", floor=True),
        "confidence": over_layers("top1_probability", "mean probability of the first choice"),
        "entropy": over_layers("entropy_bits", "mean entropy of the probabilities of a token, bits"),
        "information": lines_svg(
            {"I(domain; expert)": [entry["mutual_information"] for entry in information]},
            labels,
            "mutual information of domain and expert, bits",
            ("bias removed", [entry["bias"] for entry in information]),
        )
        if several
        else "",
        "domains": [domain_heat(inspection, index, labels[index]) for index in range(len(layers))] if several else [],
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title(inspection.model),
        description=describe(inspection.model),
        cutting=cutting(inspection.settings),
        inspection=inspection,
        several=several,
        scopes=scopes,
        scope_names={scope: scope if several else next(iter(inspection.domains)) for scope in scopes},
        summaries=summaries,
        headings=HEADINGS,
        tables={scope: table(scope) for scope in scopes},
        labels=labels,
        by_name=dict(zip([layer.name for layer in layers], labels)),
        information=[(*information_text(entry), entry) for entry in information],
        mean_information=sum(entry["mutual_information"] for entry in information) / len(information)
        if several
        else None,
        most=sorted(most),
        rest=[index for index in range(len(layers)) if index not in most],
        specialists={name: inspection.specialists(name, top) for name in inspection.domains} if several else {},
        pictures=pictures,
        legend_loads=legend_svg("≤ ¼×", "½×", "2×", "≥ 4×"),
        legend_lift=legend_svg("≤ ½×", "0.71×", "1.41×", "≥ 2×"),
        colours={"light": colour_steps(dark=False), "dark": colour_steps(dark=True)},
        offset=STEPS,
        command=command and without_paths([_without_folder(word) for word in command]),
        versions={name: versions()[name] for name in ("hf_phibalance", "torch", "transformers") if name in versions()},
    )


def domain_heat(inspection: Inspection, index: int, label: str) -> str:
    """Which experts each domain prefers in layer number `index`: share in the domain over share in all."""
    counts_DE = inspection.layers[index].counts.double()
    expected_DE = counts_DE.sum(1, keepdim=True) * counts_DE.sum(0) / counts_DE.sum()
    rows: list[list[float | None]] = [
        [value if expected >= FEWEST else None for value, expected in zip(row, expected_row)]
        for row, expected_row in zip(lift(counts_DE).tolist(), expected_DE.tolist())
    ]
    names = list(inspection.domains)
    return heat_svg(rows, names, "× its share over all texts", reach=LIFT_RANGE, caption=f"preferences, {label}")


def _without_folder(word: str) -> str:
    """`name=/a/b` as `name=b`: where files lie on one machine helps nobody else."""
    name, equals, path = word.partition("=")
    return f"{name}={Path(path).name}" if equals and Path(path).is_absolute() else word
