"""The command `phibalance`. Only what it needs to explain itself is imported before it has work to do.

```bash
phibalance inspect Qwen/Qwen1.5-MoE-A2.7B --texts math=gsm8k/test.jsonl code=src/ prose=wiki/*.txt --field math=question \
    --html report.html --json report.json
phibalance doctor Qwen/Qwen1.5-MoE-A2.7B --coef 0.01 --lora router=lora
phibalance export results/mine results/mine-plain --texts math=gsm8k/train.jsonl --field question
```
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs `phibalance` with `arguments`, those of the process unless given.

    Returns:
        `int`: the exit status: 0, 1 after an error that has been explained, 130 after Ctrl-C. Of `phibalance doctor`: 0, 1
        after a warning with `--strict`, 2 after a problem, and after an error as well.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = make_parser().parse_args(words)
    try:
        return args.run(args, ["phibalance", *words])
    except (ValueError, OSError, ImportError) as error:
        print(f"phibalance {args.command}: {error}", file=sys.stderr)
        return args.after_error
    except KeyboardInterrupt:
        print(f"phibalance {args.command}: interrupted, nothing was written", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="phibalance", description="Mixture-of-Experts routers, looked into.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    inspect = commands.add_parser(
        "inspect",
        help="how a model spreads texts over its experts: loads, dead experts, specialisation by domain",
        description="Runs a MoE model over texts, without training and without changing it, and reports how each layer "
        "spreads the tokens over its experts and how much the domains of text differ in the experts they use.",
    )
    inspect.set_defaults(run=_inspect, after_error=1)
    inspect.add_argument("model", help="folder or Hub name of a MoE model or of a PEFT adapter")
    inspect.add_argument(
        "--texts",
        nargs="+",
        required=True,
        metavar="NAME=PATH",
        help="texts by domain; a path is a file, a folder or a quoted glob of .txt, .md, .py or .jsonl files (also .gz); "
        "a name may come several times",
    )
    inspect.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="[NAME=]FIELD",
        help="fields of .jsonl rows that are the text, of all domains or of one",
    )
    inspect.add_argument(
        "--max_tokens", type=int, default=1 << 16, help="tokens of text per domain, 0 for all (default: %(default)s)"
    )
    inspect.add_argument(
        "--seq_len", type=int, help="longest sequence (default: 512, or less if the model takes less)"
    )
    inspect.add_argument("--batch_size", type=int, default=8, help="sequences of a forward (default: %(default)s)")
    inspect.add_argument(
        "--top", type=int, default=5, help="specialised experts shown per domain (default: %(default)s)"
    )
    inspect.add_argument("--json", metavar="FILE", help="write every figure there; - for the standard output")
    inspect.add_argument("--html", metavar="FILE", help="write a report there, a single file with its pictures")
    loading = _add_loading(inspect)
    loading.add_argument(
        "--ignore_phi_balance",
        action="store_true",
        help="leave out the selection bias in phi_balance.safetensors, as a plain from_pretrained does",
    )
    _add_doctor(commands)
    _add_export(commands)
    return parser


def _add_loading(command: argparse.ArgumentParser) -> Any:
    loading = command.add_argument_group("loading the model")
    loading.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: %(default)s, the checkpoint's)")
    loading.add_argument(
        "--device_map",
        help="as in from_pretrained, e.g. auto, cpu or cuda:0 (default: auto where there is an accelerator)",
    )
    loading.add_argument("--revision", help="branch, tag or commit on the Hub")
    loading.add_argument("--tokenizer", help="folder or Hub name of the tokenizer (default: the model's)")
    loading.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    return loading


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="whether a model is fit to be trained with balanced experts: the coefficient as it arrives, problems, remedies",
        description="Loads a MoE model as a training would, tries out one optimizer step on a few texts, measures the "
        "coefficient that arrives in its gradient, and names what is wrong with its remedy. Nothing is changed. Exit status: 0, "
        "1 after a warning with --strict, 2 after a problem or an error.",
    )
    doctor.set_defaults(run=_doctor, after_error=2)
    doctor.add_argument("model", help="folder or Hub name of a MoE model or of a PEFT adapter")
    doctor.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders or quoted globs of .txt, .md, .py or .jsonl to take the step on (default: made problems)",
    )
    doctor.add_argument(
        "--field", nargs="+", default=[], metavar="FIELD", help="fields of .jsonl rows that are the text"
    )
    doctor.add_argument("--seq_len", type=int, default=256, help="longest sequence (default: %(default)s)")
    doctor.add_argument("--batch_size", type=int, default=4, help="sequences of a micro-batch (default: %(default)s)")
    doctor.add_argument("--accumulation", type=int, default=1, help="micro-batches of the step (default: %(default)s)")
    balancing = doctor.add_argument_group("balancing, where it is not as the model was saved with (else the defaults)")
    balancing.add_argument("--coef", type=float, help="strength of the price gradient")
    balancing.add_argument("--bias_coef", type=float, help="step of the selection bias")
    balancing.add_argument("--method", help="a method other than φ-balancing")
    balancing.add_argument("--token_mask", choices=("attention", "labels", "all"), help="which tokens count")
    balancing.add_argument(
        "--lora",
        nargs="+",
        metavar="OPTION=VALUE",
        help="train by LoRA: router=frozen|lora|full|router-only targets=all|experts|attention r=8",
    )
    doctor.add_argument("--json", metavar="FILE", help="write the report there; - for the standard output")
    doctor.add_argument("--strict", action="store_true", help="exit with 1 after a warning")
    _add_loading(doctor)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a checkpoint for engines that know no selection bias, and what that costs",
        description="Writes a checkpoint that was saved while φ-balanced as one that vLLM, SGLang, llama.cpp or plain transformers "
        "loads. Where the selection bias is not the family's own it is folded into the routers' weights, dropped, or folded and "
        "rebalanced; all three are measured on a part of the texts, fitted on the other.",
    )
    export.set_defaults(run=_export, after_error=1)
    export.add_argument(
        "model", metavar="source", help="folder or Hub name of a model that was saved while φ-balanced"
    )
    export.add_argument("destination", help="a new or empty folder")
    export.add_argument(
        "--to", choices=("plain",), default="plain", help="what for: any engine (default: %(default)s)"
    )
    export.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="texts like those that the model will see: files, folders or quoted globs of .txt, .md, .py or .jsonl (also .gz); "
        "needed where there is a bias to lose",
    )
    export.add_argument(
        "--field", nargs="+", default=[], metavar="[NAME=]FIELD", help="fields of .jsonl rows that are the text"
    )
    export.add_argument(
        "--bias",
        choices=("fold", "rebalance", "drop"),
        default="fold",
        help="what becomes of a selection bias of ours (default: %(default)s)",
    )
    export.add_argument(
        "--max_loss_increase",
        type=float,
        default=0.01,
        help="refuse if the loss per token rises by more (default: %(default)s)",
    )
    export.add_argument("--force", action="store_true", help="write it all the same")
    export.add_argument(
        "--max_tokens", type=int, default=1 << 16, help="tokens of text per domain, 0 for all (default: %(default)s)"
    )
    export.add_argument("--seq_len", type=int, default=512, help="longest sequence (default: %(default)s)")
    export.add_argument("--batch_size", type=int, default=8, help="sequences of a forward (default: %(default)s)")
    export.add_argument("--json", metavar="FILE", help="write the figures there as well; - for the standard output")
    export.add_argument(
        "--no_check",
        action="store_true",
        help="do not load the result in a process of its own, which needs the memory of the model once more",
    )
    _add_loading(export)


def _inspect(args: argparse.Namespace, command: list[str]) -> int:
    from .inspection import parse_domains

    domains = parse_domains(args.texts, args.field)  # what can be refused before the model is loaded, is
    outputs = {name: path for name in ("json", "html") if (path := getattr(args, name)) and path != "-"}
    for name, path in outputs.items():
        if Path(path).is_dir():
            raise ValueError(f"`--{name}` {path!r} is a folder: name a file.")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    for name, least in (("max_tokens", 0), ("seq_len", 1), ("batch_size", 1), ("top", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`--{name}` is {value}: choose at least {least}.")

    from rich.console import Console

    from .inspection import html_report, inspect_model, print_inspection
    from .reporting import versions

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
        inspection.notes.append("What phi_balance.safetensors may hold was left out (--ignore_phi_balance).")
    print_inspection(inspection, console, args.top)
    if args.json:
        written = {**inspection.to_dict(args.top), "versions": versions()}
        text = json.dumps(written, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text, encoding="utf-8")
    if args.html:
        Path(args.html).write_text(html_report(inspection, args.top, command), encoding="utf-8")
    for name, path in outputs.items():
        console.print(f"{name.upper()} report in {path}", highlight=False)
    return 0


def _doctor(args: argparse.Namespace, command: list[str]) -> int:
    for name in ("seq_len", "batch_size", "accumulation"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}: choose at least 1.")
    if args.json and args.json != "-" and Path(args.json).is_dir():
        raise ValueError(f"`--json` {args.json!r} is a folder: name a file.")
    lora = _lora_options(args.lora) if args.lora is not None else None

    from .inspection import parse_domains

    domains = parse_domains([f"texts={path}" for path in args.texts], args.field) if args.texts else []

    from rich.console import Console

    from .checkup import print_report
    from .training import doctor, lora_config

    console = Console(stderr=args.json == "-")
    with Console(stderr=True).status(f"Loading {args.model}") as status:
        model = _load_to_train(args)
        if lora is not None:
            from peft import get_peft_model

            from .balancing import patch

            model = patch(get_peft_model(model, lora_config(model, **lora)))
        status.update("Trying out one optimizer step")
        report = doctor(model, _micro_batches(args, domains))
    report.model["name"] = args.model
    print_report(report, console)
    if args.json:
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(text, encoding="utf-8")
    return report.exit_status(args.strict)


def _export(args: argparse.Namespace, command: list[str]) -> int:
    for name, least in (("max_tokens", 0), ("seq_len", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}: choose at least {least}.")
    if args.json and args.json != "-" and Path(args.json).is_dir():
        raise ValueError(f"`--json` {args.json!r} is a folder: name a file.")

    from rich.console import Console

    from .portable import export, print_export

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
            **_loading_options(args),
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
    """The model with its own balancing, or with what the options say; without its state if that is damaged or foreign."""
    import dataclasses

    from .balancing import get_balancer, patch
    from .config import PhiBalanceConfig

    given = {name: getattr(args, name) for name in ("coef", "bias_coef", "method", "token_mask")}
    given = {name: value for name, value in given.items() if value is not None}
    PhiBalanceConfig(**given)  # bad input fails before the weights are loaded
    try:
        model = load_model(args, phi_balance=True)
    except ValueError:  # of its state: the report says so; what else is wrong, patching says again
        model = load_model(args, phi_balance=False)
        saved = getattr(model.config, "phi_balance", None)
        patch(model, saved if isinstance(saved, dict) else True)
    if given:
        own = {} if "method" in given else dataclasses.asdict(get_balancer(model).config)
        patch(model, PhiBalanceConfig(**(own | given)))
    return model


def _micro_batches(args: argparse.Namespace, domains: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Micro-batches of texts as a training has them; `None`, for made tokens, if the model has no tokenizer."""
    from .inspection import TextStream, padded_batches, padding_of
    from .tasks import make_splits

    try:
        tokenizer = load_tokenizer(args)
    except (ValueError, OSError):
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
    if not any(rows):
        raise ValueError("`--texts` hold no token: name files with text.")
    return padded_batches(rows, args.batch_size, padding_of(tokenizer))


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


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer; an adapter without one has that of its base model."""
    from transformers import AutoTokenizer

    from .models import base_of_adapter

    name, revision = args.tokenizer or args.model, None if args.tokenizer else args.revision
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name, revision = base_of_adapter(adapter), None
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def load_model(args: argparse.Namespace, phi_balance: bool | None = None) -> Any:
    """The model, balanced as `phi_balance` says: as it was saved, unless given."""
    from .models import load_any, register_deepseek_moe

    register_deepseek_moe()
    return load_any(args.model, phi_balance=phi_balance, **_loading_options(args))


def _loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `_add_loading` asked for, as arguments of `from_pretrained`."""
    import torch

    return {
        "dtype": args.dtype,
        "device_map": args.device_map or ("auto" if torch.accelerator.is_available() else None),
        "revision": args.revision or "main",
        "trust_remote_code": args.trust_remote_code,
    }


if __name__ == "__main__":
    sys.exit(main())
