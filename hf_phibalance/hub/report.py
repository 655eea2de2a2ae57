"""The report of a finished run: its results folder, and its figures in the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from .card import CARD_NAME, model_card, summary_table
from .pictures import CURVES_NAME, LOADS_NAME, draw, pictures_in
from .run import BASELINE_FOLDERS, SUMMARY_NAME, Run


def write_report(folder: str | os.PathLike, run: Run, baseline: Run | None, dpi: int = 130) -> None:
    """
    Writes figures, pictures and the model card of a run.

    Args:
        folder (`str` or `os.PathLike`): The results folder.
        run (`Run`): The run.
        baseline (`Run`, *optional*): A run to show beside it; kept in the folder, so that the card can be made again.
        dpi (`int`, *optional*, defaults to `130`): Resolution of the pictures.
    """
    folder = Path(folder)
    run.save(folder)
    if baseline is not None and Run.load_baseline(folder) is None:
        baseline.save(folder / BASELINE_FOLDERS[-1])
    draw(folder, run, baseline, dpi)
    model_card(run, baseline, title=folder.name, pictures=pictures_in(folder)).save(folder / CARD_NAME)


def print_summary(folder: str | os.PathLike, run: Run, baseline: Run | None, seconds: float) -> None:
    """Prints the figures as a table, and where the results are."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(
        Markdown(f"**{run.model_type}, {run.parameters / 1e6:.2f} M parameters**\n\n{summary_table(run, baseline)}")
    )
    console.print(f"Results in {folder} after {seconds:.0f} s: model, {SUMMARY_NAME}, {LOADS_NAME}, {CURVES_NAME}")
