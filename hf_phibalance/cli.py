"""The command `phibalance`. Only what it needs to explain itself is imported before it has work to do.

```bash
phibalance inspect Qwen/Qwen1.5-MoE-A2.7B --texts math=gsm8k/test.jsonl code=src/ prose=wiki/*.txt --field math=question \
    --html report.html --json report.json
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
        `int`: the exit status: 0, 1 after an error that has been explained, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = make_parser().parse_args(words)
    try:
        args.run(args, ["phibalance", *words])
    except (ValueError, OSError, ImportError) as error:
        print(f"phibalance {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"phibalance {args.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


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
    inspect.set_defaults(run=_inspect)
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
    loading = inspect.add_argument_group("loading the model")
    loading.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: %(default)s, the checkpoint's)")
    loading.add_argument(
        "--device_map",
        help="as in from_pretrained, e.g. auto, cpu or cuda:0 (default: auto where there is an accelerator)",
    )
    loading.add_argument("--revision", help="branch, tag or commit on the Hub")
    loading.add_argument("--tokenizer", help="folder or Hub name of the tokenizer (default: the model's)")
    loading.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    loading.add_argument(
        "--ignore_phi_balance",
        action="store_true",
        help="leave out the selection bias in phi_balance.safetensors, as a plain from_pretrained does",
    )
    return parser


def _inspect(args: argparse.Namespace, command: list[str]) -> None:
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
        tokenizer, model = load_tokenizer(args), load_model(args)
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

    name, revision = args.tokenizer or args.model, None if args.tokenizer else args.revision
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name, revision = json.loads(adapter.read_text())["base_model_name_or_path"], None
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def load_model(args: argparse.Namespace) -> Any:
    """The model, with the selection bias that was saved beside its weights unless it is to be ignored."""
    import torch

    from .models import AutoModelForCausalLM, register_deepseek_moe

    register_deepseek_moe()
    device_map = args.device_map or ("auto" if torch.accelerator.is_available() else None)
    return AutoModelForCausalLM.from_pretrained(
        args.model,
        phi_balance=False if args.ignore_phi_balance else None,
        dtype=args.dtype,
        device_map=device_map,
        revision=args.revision or "main",
        trust_remote_code=args.trust_remote_code,
    )


if __name__ == "__main__":
    sys.exit(main())
