"""The commands of `phibalance`. `main` imports them when the arguments are parsed, so that `--help` is fast."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from ..balancing import get_balancer, patch
from ..config import PhiBalanceConfig
from ..files import STATE_NAME, find_file, printable, quoted, versions
from ..inspection import (
    Comparison,
    TextStream,
    check_same_ids,
    check_texts,
    html_report,
    inspect_model,
    padded_batches,
    padding_of,
    parse_domains,
    place,
    print_comparison,
    print_inspection,
    print_placement,
)
from ..maths import experts_per_rank
from ..models import Upcycling, check_whole, load_any, load_tokenizer, register_deepseek_moe
from ..routers import find_routers, predicts_tokens
from ..tasks import make_splits
from .runs import Run, follow, screen


BALANCING = ("coef", "bias_coef", "method", "token_mask")  # options of the doctor


def run_inspect(args: argparse.Namespace, command: list[str]) -> int:
    # refuse what can be refused before the model is loaded
    domains = parse_domains(args.texts, args.field)
    _check_numbers(args, seq_len=1, batch_size=1, max_tokens=0, top=0, examples=0)
    for name in ("json", "html"):
        _check_file(name, getattr(args, name))
    if args.json and args.json == args.html:
        raise ValueError(f"`--json` and `--html` are both {quoted(args.json)}: name two files.")
    models = [args]
    if args.tuned:
        models.append(argparse.Namespace(**{**vars(args), "model": args.tuned, "revision": None}))
    for one in models:
        _check_model(one)

    console, errors = Console(stderr=args.json == "-"), Console(stderr=True)
    with errors.status(f"Loading {escape(printable(args.model))}"):
        tokenizers = [_load_tokenizer(one) for one in models]
        for tokenizer in tokenizers:
            check_texts(domains, tokenizer)
        if args.tuned:
            check_same_ids(domains, tokenizers, [one.model for one in models], args.max_tokens or None)
    inspections: list[Any] = []
    for one in models:
        inspections.append(_inspect(one, tokenizers[0], domains, errors))
        models[-1].seq_len = inspections[0].settings["seq_len"]  # the second model reads the same sequences
    found: Any = Comparison(*inspections) if args.tuned else inspections[0]
    show: Any = print_comparison if args.tuned else print_inspection
    words = list(map(printable, command))
    with ExitStack() as reports:  # runs all, the last first, even if one fails
        reports.callback(show, found, console, args.top)
        if args.html:
            reports.callback(lambda: _write(html_report(found, args.top, words), args.html))
        reports.callback(lambda: _write_json({**found.to_dict(args.top), "versions": versions()}, args.json))
    for name, path in (("JSON", args.json), ("HTML", args.html)):
        if path and path != "-":
            console.print(f"{name} report in {escape(printable(path))}", highlight=False)
    return 0


def _inspect(args: argparse.Namespace, tokenizer: Any, domains: Sequence[Any], errors: Any) -> Any:
    """Loads a model, and inspects it with progress bars on the console `errors`. The model is freed afterwards."""
    with errors.status(f"Loading {escape(printable(args.model))}"):
        model = _load_model(args, False if args.ignore_phi_balance else None)
    for site in find_routers(model) if "ranks" in args else ():
        experts_per_rank(site.num_experts, args.ranks)  # raises before the texts are read
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}", markup=False), *columns, console=errors, transient=True
    ) as progress:
        total = args.max_tokens or None
        bars = {domain.name: progress.add_task(domain.name, total=total, start=False) for domain in domains}

        def on_batch(stream: Any) -> None:
            progress.start_task(bars[stream.domain.name])
            progress.update(bars[stream.domain.name], completed=stream.tokens)

        settings = {name: getattr(args, name) for name in ("seq_len", "batch_size", "packing")}
        settings |= {"examples": args.examples if args.html else 0, "keep_choices": bool(args.tuned)}
        inspection = inspect_model(model, tokenizer, domains, max_tokens=total, on_batch=on_batch, **settings)
    inspection.model["name"] = printable(args.model)
    if args.ignore_phi_balance:
        inspection.notes.append(f"{STATE_NAME} was ignored (--ignore_phi_balance).")
    return inspection


def run_place(args: argparse.Namespace, command: list[str]) -> int:
    domains = parse_domains(args.texts, args.field)
    _check_numbers(args, ranks=1, seq_len=1, batch_size=1, max_tokens=0)
    for name in ("json", "map"):
        _check_file(name, getattr(args, name))
    if args.map and (args.map == args.json or not args.map.endswith((".json", "-"))):
        raise ValueError(
            f"`--map` must be a .json file (SGLang reads no other) that is not that of `--json`, got {args.map}."
        )
    _check_model(args)

    console, errors = Console(stderr="-" in (args.json, args.map)), Console(stderr=True)
    tokenizer = _load_tokenizer(args)
    check_texts(domains, tokenizer)
    placement = place(_inspect(args, tokenizer, domains, errors), args.ranks)
    print_placement(placement, console)
    _write_json({**placement.to_dict(), "versions": versions()}, args.json)
    if args.map:
        _write_json(placement.expert_map(), args.map)
        console.print(f"Map of experts for SGLang in {escape(printable(args.map))}", highlight=False)
    return 0


def run_doctor(args: argparse.Namespace, command: list[str]) -> int:
    _check_numbers(args, seq_len=1, batch_size=1, accumulation=1)
    _check_file("json", args.json)
    for name in BALANCING if args.stock else ():
        if getattr(args, name) is not None:
            raise ValueError(
                f"`--{name}` is for balancing, and `--stock` examines the model's own loss. Leave one of them out."
            )
    lora = _lora_options(args.lora) if args.lora is not None else None

    domains = parse_domains([f"texts={path}" for path in args.texts], args.field) if args.texts else []
    _check_model(args)
    if domains:
        check_texts(domains, _load_tokenizer(args))  # before the model is loaded

    from ..diagnosis import print_report
    from ..training import audit, doctor, lora_config

    console = Console(stderr=args.json == "-")
    with Console(stderr=True).status(f"Loading {escape(printable(args.model))}") as status:
        model = _load_model(args, False, is_trainable=True) if args.stock else _load_to_train(args)
        if lora is not None:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(model, **lora))
            model = model if args.stock else patch(model)
        status.update("Trying one optimizer step")
        batches = _micro_batches(args, domains)
        if batches is not None and not predicts_tokens(model):
            batches = [{name: part for name, part in batch.items() if name != "labels"} for batch in batches]
        report = audit(model, batches) if args.stock else doctor(model, batches)
    report.model["name"] = printable(args.model)
    _write_json(report.to_dict(), args.json)
    print_report(report, console)
    return report.exit_status(args.strict)


def run_export(args: argparse.Namespace, command: list[str]) -> int:
    _check_numbers(args, max_tokens=0, seq_len=1, batch_size=1)
    _check_file("json", args.json)
    _check_model(args)

    from ..exporting import export, print_export

    console = Console(stderr=args.json == "-")
    names = ("bias", "max_loss_increase", "force", "field", "max_tokens", "seq_len", "batch_size", "tokenizer")
    options = {name: getattr(args, name) for name in names} | _loading_options(args)
    options |= {"check": not args.no_check, "on_report": lambda report: print_export(report, console)}
    with Console(stderr=True).status(f"Exporting {escape(printable(args.model))}"):
        report = export(args.model, args.destination, args.texts, **options)
    _write_json(report.to_dict(), args.json)
    console.print(f"An ordinary checkpoint in {escape(printable(args.destination))}", highlight=False)
    return 0


def run_watch(args: argparse.Namespace, command: list[str]) -> int:
    _check_file("html", args.html)

    console = Console()
    if args.html:
        run = Run(args.folder)
        words = list(map(printable, command))
        _write(html_report(run.inspection(), command=words, run=run.for_page()), args.html)
        console.print(f"HTML report in {escape(printable(args.html))}", highlight=False)
    elif args.once or not console.is_terminal:
        console.print(screen(Run(args.folder), console))
    else:
        follow(args.folder, console)
    return 0


def run_upcycle(args: argparse.Namespace, command: list[str]) -> int:
    _check_file("json", args.json)
    _check_model(args)

    from ..exporting import upcycle_checkpoint

    options = Upcycling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Upcycling)})
    names = ("tokenizer", "max_shard_gb", "revision")
    settings = {name: getattr(args, name) for name in names} | {"check": not args.no_check}
    with Console(stderr=True).status(f"Upcycling {escape(printable(args.model))}"):
        report = upcycle_checkpoint(args.model, args.destination, options, **settings)
    _write_json(report.to_dict(), args.json)
    console = Console(stderr=args.json == "-")
    console.print(Markdown(report.to_markdown()))
    console.print(f"A checkpoint in {escape(printable(args.destination))}", highlight=False)
    return 0


def _check_numbers(args: argparse.Namespace, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"`--{name}` is {value}: choose at least {smallest}.")


def _check_file(option: str, path: str | None) -> None:
    """Raises if the file cannot be written. Makes its folder."""
    if not path or path == "-":
        return
    if Path(path).is_dir():
        raise ValueError(f"`--{option}` {quoted(path)} is a folder: name a file.")
    is_new = not Path(path).exists()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).open("ab").close()
    if is_new:
        Path(path).unlink()


def _check_model(args: argparse.Namespace) -> None:
    """Raises if the model is neither a folder nor on the Hub."""
    if Path(args.model).is_dir():
        return
    if Path(args.model).exists():
        raise ValueError(f"{quoted(args.model)} is a file: name the folder of the checkpoint.")
    try:
        names = ("config.json", "adapter_config.json")
        if any(find_file(args.model, name, _loading_options(args)) for name in names):
            return
        reason = ""
    except (OSError, ValueError) as error:  # from the Hub: wrong name, revision or access
        reason = f" ({str(error).strip().splitlines()[0]})"
    raise ValueError(
        f"there is no folder {quoted(args.model)}, and the Hub has no such model or cannot be reached{reason}. Check the name. "
        "Unset HF_HUB_OFFLINE to download a model; run `hf auth login` for a private or gated one."
    )


def _write_json(figures: dict[str, Any], path: str | None) -> None:
    """Writes `figures` to the file `path`, to the standard output if it is `-`, or nowhere if there is none."""
    if not path:
        return
    text = json.dumps(figures, indent=1, allow_nan=False, ensure_ascii=path == "-") + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        _write(text, path)


def _write(text: str, path: str) -> None:
    """Writes UTF-8. Escapes invalid Unicode."""
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def _loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns arguments of `from_pretrained`."""
    return {
        "dtype": args.dtype,
        "device_map": args.device_map or ("auto" if torch.accelerator.is_available() else None),
        "revision": args.revision or "main",
        "trust_remote_code": args.trust_remote_code,
    }


def _load_tokenizer(args: argparse.Namespace) -> Any:
    return load_tokenizer(args.model, args.tokenizer, _loading_options(args))


def _load_model(args: argparse.Namespace, phi_balance: bool | None, is_trainable: bool = False) -> Any:
    """Loads the model, balanced as it was saved if `phi_balance` is `None`. The adapter, if any, may be trainable."""
    register_deepseek_moe()
    loading = {"phi_balance": phi_balance, "is_trainable": is_trainable, **_loading_options(args)}
    try:
        model, info = load_any(args.model, output_loading_info=True, **loading)
    except (SafetensorError, RuntimeError, AssertionError) as error:  # damaged weights, other shapes, no such device
        raise ValueError(f"{args.model} cannot be loaded: {str(error).strip()}") from error
    if not Path(args.model, "adapter_config.json").is_file():
        check_whole(info, args.model)
    return model


def _load_to_train(args: argparse.Namespace) -> Any:
    """
    Loads the model for training, with a trainable adapter. The options override its saved balancing. A damaged or
    foreign state is ignored.
    """
    given = {name: getattr(args, name) for name in BALANCING}
    given = {name: value for name, value in given.items() if value is not None}
    PhiBalanceConfig(**given)  # bad values fail before the weights are loaded
    try:
        model = _load_model(args, phi_balance=True, is_trainable=True)
    except ValueError:  # from the state: the report names it. `patch` raises other errors again
        saved = PhiBalanceConfig.of_checkpoint(args.model) or PhiBalanceConfig()
        model = patch(_load_model(args, phi_balance=False, is_trainable=True), saved)
    if given:
        own = {} if "method" in given else dataclasses.asdict(get_balancer(model).config)
        patch(model, PhiBalanceConfig(**(own | given)))
    return model


def _lora_options(words: Sequence[str]) -> dict[str, Any]:
    """Returns `router=lora r=4` as arguments of `lora_config`."""
    known = {"router": str, "targets": str, "r": int, "lora_alpha": int}
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known or not value:
            raise ValueError(f"`--lora` {word!r}: write OPTION=VALUE with one of {', '.join(known)}.")
        options[name] = known[name](value)
    return options


def _micro_batches(args: argparse.Namespace, domains: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Returns micro-batches of texts, or `None` (random tokens) if the model has no tokenizer and no texts were given."""
    try:
        tokenizer = _load_tokenizer(args)
    except ValueError:
        if domains or args.tokenizer:
            raise
        return None
    count = args.batch_size * args.accumulation
    if domains:
        rows = [row for row, _ in zip(TextStream(domains[0], tokenizer, args.seq_len), range(count))]
    else:
        problems = [f"{row['question']} {row['answer']}" for row in make_splits(count)["train"]]
        rows = [tokenizer(text)["input_ids"][: args.seq_len] for text in problems]
    batches = padded_batches(rows, args.batch_size, padding_of(tokenizer))
    if len(batches) < args.accumulation:
        raise ValueError(
            f"`--accumulation` is {args.accumulation}, but `--texts` fill only {len(batches)} micro-batches of {args.batch_size} rows: "
            "give more texts, or a smaller --batch_size or --seq_len."
        )
    return batches
