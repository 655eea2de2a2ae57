"""`phibalance inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ..files import STATE_NAME, printable
from .loading import load_model, load_tokenizer
from .output import check_file, write_json, write_text


def run_inspect(args: argparse.Namespace, command: list[str]) -> int:
    from ..inspection import check_texts, parse_domains

    domains = parse_domains(args.texts, args.field)  # what can be refused before the model is loaded, is
    outputs = {name: path for name in ("json", "html") if (path := getattr(args, name)) and path != "-"}
    for name, path in outputs.items():
        check_file(name, path)
    for name, least in (("max_tokens", 0), ("seq_len", 1), ("batch_size", 1), ("top", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`--{name}` is {value}: choose at least {least}.")

    from rich.console import Console
    from rich.markup import escape

    from ..files import versions
    from ..inspection import html_report, inspect_model, print_inspection

    console, bar_console = Console(stderr=args.json == "-"), Console(stderr=True)
    with bar_console.status(f"Loading {escape(printable(args.model))}"):
        tokenizer = load_tokenizer(args)
        check_texts(domains, tokenizer)
        model = load_model(args, False if args.ignore_phi_balance else None)
    with Progresses(bar_console, [domain.name for domain in domains], args.max_tokens or None) as progress:
        inspection = inspect_model(
            model,
            tokenizer,
            domains,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens or None,
            packing=args.packing,
            on_batch=progress.show,
        )
    inspection.model["name"] = printable(args.model)
    if args.ignore_phi_balance:
        inspection.notes.append(f"What {STATE_NAME} may hold was left out (--ignore_phi_balance).")
    words = list(map(printable, command))
    with ExitStack() as reports:  # the last one first, and each even if another one fails
        reports.callback(print_inspection, inspection, console, args.top)
        if args.html:
            reports.callback(lambda: write_text(html_report(inspection, args.top, words), args.html))
        reports.callback(lambda: write_json({**inspection.to_dict(args.top), "versions": versions()}, args.json))
    for name, path in outputs.items():
        console.print(f"{name.upper()} report in {escape(printable(path))}", highlight=False)
    return 0


class Progresses:
    """
    Progress bars of the domains, in the order they are read.

    Args:
        console ([`rich.console.Console`]): Where to show them.
        names (`Sequence[str]`): The domains.
        max_tokens (`int`, *optional*): Tokens that are read of each, if not all.
    """

    def __init__(self, console: Any, names: Sequence[str], max_tokens: int | None) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks = {name: self._progress.add_task(name, total=max_tokens, start=False, tokens=0) for name in names}

    def __enter__(self) -> Progresses:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, stream: Any) -> None:
        """A batch of the [`~inspection.texts.TextStream`] `stream` has been counted."""
        task = self._tasks[stream.domain.name]
        self._progress.start_task(task)
        self._progress.update(task, completed=stream.tokens, tokens=stream.tokens)
