"""`phibalance doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..files import printable
from .loading import load_model, load_tokenizer
from .output import check_file, write_json


def run_doctor(args: argparse.Namespace, command: list[str]) -> int:
    for name in ("seq_len", "batch_size", "accumulation"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}: choose at least 1.")
    check_file("json", args.json)
    lora = _lora_options(args.lora) if args.lora is not None else None

    from ..inspection import check_texts, parse_domains

    domains = parse_domains([f"texts={path}" for path in args.texts], args.field) if args.texts else []
    if domains:
        check_texts(domains, load_tokenizer(args))  # before the model is loaded

    from rich.console import Console
    from rich.markup import escape

    from ..diagnosis import print_report
    from ..routers import predicts_tokens
    from ..training import doctor, lora_config

    console = Console(stderr=args.json == "-")
    with Console(stderr=True).status(f"Loading {escape(printable(args.model))}") as status:
        model = _load_to_train(args)
        if lora is not None:
            from peft import get_peft_model

            from ..balancing import patch

            model = patch(get_peft_model(model, lora_config(model, **lora)))
        status.update("Trying out one optimizer step")
        batches = _micro_batches(args, domains)
        if batches is not None and not predicts_tokens(model):
            batches = [{name: part for name, part in batch.items() if name != "labels"} for batch in batches]
        report = doctor(model, batches)
    report.model["name"] = printable(args.model)
    write_json(report.to_dict(), args.json)
    print_report(report, console)
    return report.exit_status(args.strict)


def _lora_options(words: Sequence[str]) -> dict[str, Any]:
    """`router=lora r=4` as arguments of `lora_config`."""
    known = {"router": str, "targets": str, "r": int, "lora_alpha": int}
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known or not value:
            raise ValueError(f"`--lora` {word!r}: write OPTION=VALUE with one of {', '.join(known)}.")
        options[name] = known[name](value)
    return options


def _load_to_train(args: argparse.Namespace) -> Any:
    """
    Loads the model as a training does: an adapter is trainable. Its balancing is its own, or what the options say. Leaves out a
    state that is damaged or foreign.
    """
    import dataclasses

    from ..balancing import get_balancer, patch
    from ..config import PhiBalanceConfig

    given = {name: getattr(args, name) for name in ("coef", "bias_coef", "method", "token_mask")}
    given = {name: value for name, value in given.items() if value is not None}
    PhiBalanceConfig(**given)  # bad input fails before the weights are loaded
    try:
        model = load_model(args, phi_balance=True, is_trainable=True)
    except ValueError:  # of its state: the report says so; what else is wrong, patching says again
        saved = PhiBalanceConfig.of_checkpoint(args.model) or PhiBalanceConfig()
        model = patch(load_model(args, phi_balance=False, is_trainable=True), saved)
    if given:
        own = {} if "method" in given else dataclasses.asdict(get_balancer(model).config)
        patch(model, PhiBalanceConfig(**(own | given)))
    return model


def _micro_batches(args: argparse.Namespace, domains: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Micro-batches of texts as a training has them; `None`, for made tokens, if the model has no tokenizer."""
    from ..inspection import TextStream, padded_batches, padding_of
    from ..tasks import make_splits

    try:
        tokenizer = load_tokenizer(args)
    except ValueError:
        if domains or args.tokenizer:
            raise
        return None
    count = args.batch_size * args.accumulation
    if domains:
        stream = TextStream(domains[0], tokenizer, args.seq_len)
        rows = [row for row, _ in zip(stream, range(count))]
    else:
        problems = [f"{row['question']} {row['answer']}" for row in make_splits(count)["train"]]
        rows = [tokenizer(text)["input_ids"][: args.seq_len] for text in problems]
    return padded_batches(rows, args.batch_size, padding_of(tokenizer))
