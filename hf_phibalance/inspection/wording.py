"""How figures and models are written, in the terminal as on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


HEADINGS = {
    "max_vio": "MaxVio",
    "gini": "Gini",
    "cv": "CV",
    "normalised_entropy": "entropy",
    "dead_experts": "dead",
    "top1_probability": "top-1",
    "chosen_probability": "chosen",
    "entropy_bits": "H(p)",
}


def figure_text(figures: Mapping[str, Any], name: str) -> tuple[str, bool]:
    """A figure as it is shown, and whether it is within what chance gives: then a `≈` stands before it."""
    noise = bool(figures.get("noise", {}).get(name, False))
    if name == "dead_experts":
        noise = noise and bool(figures[name])
        return f"{'≈' if noise else ''}{figures[name]}", noise
    return f"{'≈' if noise else ''}{figures[name]:.3f}", noise


def information_text(figures: Mapping[str, Any]) -> tuple[str, bool]:
    """The mutual information of [`specialisation_figures`] as it is shown, and whether it is noise."""
    return f"{'≈' if figures['noise'] else ''}{figures['mutual_information']:.4f}", bool(figures["noise"])


def title(model: Mapping[str, Any]) -> str:
    """Name of a model, without the folder it lies in."""
    name = str(model["name"])
    return Path(name).resolve().name if Path(name).exists() else name


def cutting(settings: Mapping[str, Any]) -> str:
    """Says how texts were cut into sequences."""
    if settings["packing"]:
        return f"The texts of a domain are joined by line ends and cut into sequences of {settings['seq_len']} tokens."
    return (
        f"Each row, and each file of plain text, is cut into sequences of at most {settings['seq_len']} tokens. No sequence holds two "
        "texts."
    )


def describe(model: Mapping[str, Any]) -> str:
    """A model in one line."""

    def many(values: Sequence[int]) -> str:
        return " or ".join(map(str, values))

    count = model["parameters"]
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    return (
        f"{model['model_type']}, {size} parameters in {model['dtype']}, {model['routers']} routers of "
        f"{many(model['experts'])} experts, top-{many(model['top_k'])}; selection bias: {model['selection_bias']}"
    )
