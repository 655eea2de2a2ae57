"""`phibalance export`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .loading import loading_options


def run_export(args: argparse.Namespace, command: list[str]) -> int:
    for name, least in (("max_tokens", 0), ("seq_len", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}: choose at least {least}.")
    if args.json and args.json != "-" and Path(args.json).is_dir():
        raise ValueError(f"`--json` {args.json!r} is a folder: name a file.")

    from rich.console import Console

    from ..portable import export, print_export

    console = Console(stderr=args.json == "-")
    with Console(stderr=True).status(f"Exporting {args.model}"):
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
    if args.json:
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(text, encoding="utf-8")
    console.print(f"An ordinary checkpoint in {args.destination}", highlight=False)
    return 0
