"""What an export did, and what it costs: in the terminal, as JSON, and for the model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..balancing import Measurement
from ..files import layer_labels, public_name, versions


VARIANTS = {  # as users name them, and as what they are called in the figures
    "fold": "folded",
    "drop": "dropped",
    "rebalance": "rebalanced",
}
MEANINGS = {
    "biased": "as trained, with the bias",
    "dropped": "bias dropped",
    "folded": "bias folded into the routers",
    "rebalanced": "folded, loads rebalanced",
}
DONE = {
    "dropped": "was dropped",
    "folded": "was folded into the weights of the routers (a ridge regression of the shifts that it stands for on their inputs)",
    "rebalanced": "was folded into the weights of the routers, whose loads were then brought nearer to what they were with it",
}


@dataclass
class ExportReport:
    """
    What [`export`] did.

    Attributes:
        source (`str`): the checkpoint that was exported.
        bias (`str`): what there was: `"native"`, the family's own; `"ours"`, in `phi_balance.state`; or `"none"`.
        base (`str`, *optional*): the base model that the adapter `source` was merged into.
        kept (`str`, *optional*): the variant that was written, where there was a choice.
        variants (`dict[str, Measurement]`): on the texts that were measured on, if there were any.
        r2 (`dict[str, float]`): by layer name, see [`FoldReport`].
        fitted_tokens (`int`): that the fold was fitted on, which are others.
        max_loss_increase (`float`), forced (`bool`): what was allowed.
        loaded_alone (`dict`, *optional*): what a process without this package found in the result.
    """

    source: str
    bias: str
    base: str | None = None
    kept: str | None = None
    variants: dict[str, Measurement] = field(default_factory=dict)
    r2: dict[str, float] = field(default_factory=dict)
    fitted_tokens: int = 0
    max_loss_increase: float = 0.0
    forced: bool = False
    loaded_alone: dict[str, Any] | None = None

    def loss_increase(self, variant: str | None = None) -> float:
        """By how much the loss of a variant, of the one that was kept unless said, is above that with the bias."""
        variant = variant or self.kept
        if variant is None or "biased" not in self.variants:
            return 0.0
        return float(self.variants[variant].loss or 0.0) - float(self.variants["biased"].loss or 0.0)

    @property
    def summary(self) -> str:
        """What was done to the adapter and to the bias."""
        merged = f"The adapter was merged into {public_name(self.base)}. " if self.base else ""
        if self.bias == "native":
            return f"{merged}The selection bias is the family's own: it is in the weights, and every engine knows it."
        if self.kept is None:
            return f"{merged}There is no selection bias that could be lost."
        return f"{merged}The selection bias, which no engine but hf_phibalance knows, {DONE[self.kept]}."

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        layers = {
            name: {"r2": r2}
            | {f"max_vio_{variant}": figures.max_vio[name] for variant, figures in self.variants.items()}
            | {f"changed_{variant}": figures.changed[name] for variant, figures in self.variants.items()}
            for name, r2 in self.r2.items()
        }
        return {
            "source": public_name(self.source),
            "base": self.base and public_name(self.base),
            "bias": self.bias,
            "kept": self.kept,
            "loss_increase": self.loss_increase(),
            "max_loss_increase": self.max_loss_increase,
            "forced": self.forced,
            "variants": {name: figures.to_dict() for name, figures in self.variants.items()},
            "fitted_tokens": self.fitted_tokens,
            "layers": layers,
            "loaded_alone": self.loaded_alone,
            "versions": versions(),
        }

    def card_section(self) -> str:
        """For the model card."""
        lines = ["## Exported for any engine", "", f"Exported by `phibalance export`. {self.summary}"]
        if self.variants:
            tokens = next(iter(self.variants.values())).tokens
            lines += [
                f"Measured on {tokens:,} tokens" + (", which it was not fitted on:" if self.kept else ":"),
                "",
                "| variant | loss | MaxVio | assignments changed |",
                "|---|---:|---:|---:|",
            ]
            for name, figures in self.variants.items():
                row = f"{figures.loss:.4f} | {figures.max_vio_global:.3f} | {figures.changed_share:.1%}"
                mark = "**" if name == self.kept else ""
                lines.append(f"| {mark}{MEANINGS[name]}{mark} | {row} |")
        lines += [
            "",
            "It loads without `hf_phibalance`. What this card says elsewhere of `phi_balance.state` holds for the model "
            "that it was exported from.",
        ]
        return "\n".join(lines) + "\n"


def print_export(report: ExportReport, console: Any) -> None:
    """Prints `report` to the [`rich.console.Console`] `console`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def make_table(heading: str, *columns: str) -> Table:
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        return table

    console.print(Text(report.source, style="bold"))
    console.print(Text(report.summary), highlight=False)
    if report.variants:
        tokens = next(iter(report.variants.values())).tokens
        table = make_table(f"On {tokens:,} tokens", "variant", "loss", "more", "MaxVio", "changed")
        for name, figures in report.variants.items():
            row = [f"{figures.loss:.4f}", "", f"{figures.max_vio_global:.3f}", ""]
            if name != "biased":
                row[1], row[3] = f"{report.loss_increase(name):+.4f}", f"{figures.changed_share:.1%}"
            table.add_row(MEANINGS[name], *row, style="bold" if name == report.kept else "")
        console.print(table)
    if report.kept and report.r2:
        kept = report.variants[report.kept]
        table = make_table("Layers", "layer", "r²", "MaxVio, biased", report.kept, "changed")
        for name, label in zip(report.r2, layer_labels(list(report.r2))):
            biased = report.variants["biased"].max_vio[name]
            row = [f"{report.r2[name]:.3f}", f"{biased:.3f}", f"{kept.max_vio[name]:.3f}", f"{kept.changed[name]:.1%}"]
            table.add_row(Text(label), *row)
        console.print(table)
        console.print(
            "changed: assignments that are others than with the bias; r²: how constant the inputs of a router can be made, which "
            "is what a bias in its weight lives on",
            style="dim",
            highlight=False,
        )
