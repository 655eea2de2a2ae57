"""`phibalance inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..sidecar import STATE_NAME
from .loading import load_model, load_tokenizer
from .output import check_file, write_json


def run_inspect(args: argparse.Namespace, command: list[str]) -> int:
    from ..inspection import parse_domains

    domains = parse_domains(args.texts, args.field)  # what can be refused before the model is loaded, is
    outputs = {name: path for name in ("json", "html") if (path := getattr(args, name)) and path != "-"}
    for name, path in outputs.items():
        check_file(name, path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    for name, least in (("max_tokens", 0), ("seq_len", 1), ("batch_size", 1), ("top", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`--{name}` is {value}: choose at least {least}.")

    from rich.console import Console

    from ..inspection import html_report, inspect_model, print_inspection
    from ..reporting import versions

    console, bar_console = Console(stderr=args.json == "-"), Console(stderr=True)
    with bar_console.status(f"Loading {args.model}"):
        tokenizer, model = load_tokenizer(args), load_model(args, False if args.ignore_phi_balance else None)
    with Progresses(bar_console, [domain.name for domain in domains]) as progress:
        inspection = inspect_model(
            model,
            tokenizer,
            domains,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens or None,
            on_batch=progress.show,
        )
    inspection.model["name"] = args.model
    if args.ignore_phi_balance:
        inspection.notes.append(f"What {STATE_NAME} may hold was left out (--ignore_phi_balance).")
    print_inspection(inspection, console, args.top)
    if args.json:
        write_json({**inspection.to_dict(args.top), "versions": versions()}, args.json)
    if args.html:
        Path(args.html).write_text(html_report(inspection, args.top, command), encoding="utf-8")
    for name, path in outputs.items():
        console.print(f"{name.upper()} report in {path}", highlight=False)
    return 0


class Progresses:
    """
    Progress bars of the domains, in the order they are read.

    Args:
        console ([`rich.console.Console`]): Where to show them.
        names (`Sequence[str]`): The domains.
    """

    def __init__(self, console: Any, names: Sequence[str]) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks = {name: self._progress.add_task(name, total=1.0, start=False, tokens=0) for name in names}

    def __enter__(self) -> Progresses:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, stream: Any) -> None:
        """A batch of the [`~inspection.texts.TextStream`] `stream` has been counted."""
        task = self._tasks[stream.domain.name]
        self._progress.start_task(task)
        self._progress.update(task, completed=stream.progress, tokens=stream.tokens)
