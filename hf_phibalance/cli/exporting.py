"""`phibalance export`."""

from __future__ import annotations

import argparse

from ..files import printable
from .loading import loading_options
from .output import check_file, write_json


def run_export(args: argparse.Namespace, command: list[str]) -> int:
    for name, least in (("max_tokens", 0), ("seq_len", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}: choose at least {least}.")
    check_file("json", args.json)

    from rich.console import Console
    from rich.markup import escape

    from ..exporting import export, print_export

    console = Console(stderr=args.json == "-")
    with Console(stderr=True).status(f"Exporting {escape(printable(args.model))}"):
        report = export(
            args.model,
            args.destination,
            args.texts,
            bias=args.bias,
            max_loss_increase=args.max_loss_increase,
            force=args.force,
            field=args.field,
            max_tokens=args.max_tokens,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            tokenizer=args.tokenizer,
            check=not args.no_check,
            on_report=lambda report: print_export(report, console),
            **loading_options(args),
        )
    write_json(report.to_dict(), args.json)
    console.print(f"An ordinary checkpoint in {escape(printable(args.destination))}", highlight=False)
    return 0
