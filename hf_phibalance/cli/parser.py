"""The words of the command line `phibalance`."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import STATE_NAME
from .checking import run_doctor
from .exporting import run_export
from .inspecting import run_inspect


DTYPES = ("auto", "float32", "bfloat16", "float16")
PATHS = "a file, a folder or a quoted glob: plain text, or rows (.jsonl, .json, .csv, .parquet), also compressed (.gz)"
FIELDS = "fields of a row that are its text (default: text, messages, prompt completion, question answer, or the only one with text)"


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
    inspect.set_defaults(run=run_inspect, after_error=1)
    inspect.add_argument("model", help="folder or Hub name of a MoE model or of a PEFT adapter")
    inspect.add_argument(
        "--texts",
        nargs="+",
        required=True,
        metavar="NAME=PATH",
        help=f"texts by domain; a path is {PATHS}; a name may come several times. A row is a text, and a whole file of plain text is "
        "one; each is cut into sequences of its own, unless --packing is given. Messages go through the chat template",
    )
    inspect.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="[NAME=]FIELD",
        help=f"{FIELDS}, of all domains or of one",
    )
    inspect.add_argument(
        "--max_tokens", type=int, default=1 << 16, help="tokens of text per domain, 0 for all (default: %(default)s)"
    )
    inspect.add_argument(
        "--seq_len", type=int, help="longest sequence (default: 512, or less if the model takes less)"
    )
    inspect.add_argument(
        "--packing",
        action="store_true",
        help="join the texts of a domain by line ends and fill sequences with them, so that short rows are read as in a file of "
        "plain text",
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
        help=f"leave out the selection bias in {STATE_NAME}, as a plain from_pretrained does",
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
    doctor.set_defaults(run=run_doctor, after_error=2)
    doctor.add_argument("model", help="folder or Hub name of a MoE model or of a PEFT adapter")
    doctor.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"texts to take the step on (default: made problems); a path is {PATHS}",
    )
    doctor.add_argument("--field", nargs="+", default=[], metavar="FIELD", help=FIELDS)
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
    export.set_defaults(run=run_export, after_error=1)
    export.add_argument(
        "model", metavar="source", help="folder or Hub name of a model or adapter that was saved while φ-balanced"
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
        help=f"texts like those that the model will see, needed where there is a bias to lose; a path is {PATHS}",
    )
    export.add_argument("--field", nargs="+", default=[], metavar="[NAME=]FIELD", help=FIELDS)
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
