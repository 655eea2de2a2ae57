"""The report of a finished run: everything in its results folder, and the figures in the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from .card import CARD_NAME, model_card
from .pictures import CURVES_NAME, LOADS_NAME, draw, pictures_in
from .run import BASELINE_FOLDERS, SUMMARY_NAME, Run
from .tables import summary_rows


def write_report(
    folder: str | os.PathLike,
    run: Run,
    baseline: Run | None,
    card_template: str | os.PathLike | None = None,
    dpi: int = 130,
) -> None:
    """
    Writes JSON metrics, pictures and the model card of a run.

    Args:
        folder (`str` or `os.PathLike`): The results folder.
        run (`Run`): The run.
        baseline (`Run`, *optional*): A run to show beside it; kept in the folder, so that the card can be made again.
        card_template (`str` or `os.PathLike`, *optional*): Template of the model card, else [`find_template`]'s.
        dpi (`int`, *optional*, defaults to `130`): Resolution of the pictures.
    """
    folder = Path(folder)
    run.save(folder)
    if baseline is not None and Run.load_baseline(folder) is None:
        baseline.save(folder / BASELINE_FOLDERS[-1])
    draw(folder, run, baseline, dpi)
    card = model_card(run, baseline, card_template, title=folder.name, pictures=pictures_in(folder))
    card.save(folder / CARD_NAME)


def print_summary(folder: str | os.PathLike, run: Run, baseline: Run | None, seconds: float) -> None:
    """Prints the figures as a table, and where the results are."""
    from rich.console import Console
    from rich.table import Table

    summary = run.summary
    table = Table(title=f"{summary['model_type']}, {summary['parameters'] / 1e6:.2f} M parameters")
    table.add_column("")
    for shown in [run] if baseline is None else [baseline, run]:
        table.add_column(shown.name, justify="right")
    for row in summary_rows(run, baseline):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Results in {folder} after {seconds:.0f} s: model, {SUMMARY_NAME}, {LOADS_NAME}, {CURVES_NAME}")
