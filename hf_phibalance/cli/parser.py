"""The arguments of the command `phibalance`."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import STATE_NAME


MODEL = "folder or Hub name of a MoE model or PEFT adapter"
PATHS = "A path is a file, a folder or a quoted glob: plain text, or rows (.jsonl, .json, .csv, .parquet), also compressed (.gz)."


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="phibalance", description="Inspects, checks, watches, exports and makes Mixture-of-Experts models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_inspect(commands)
    _add_place(commands)
    _add_doctor(commands)
    _add_export(commands)
    _add_watch(commands)
    _add_upcycle(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show which experts a model uses for your texts: load, dead experts, specialisation by domain",
        description="Runs a MoE model over texts and reports how each layer spreads the tokens over its experts, and how much "
        "the domains of text differ in the experts they use. With a second model, reports what changed. Nothing is trained.",
    )
    inspect.add_argument("model", help=MODEL)
    inspect.add_argument(
        "tuned",
        nargs="?",
        help="the same model after fine-tuning, or its adapter: report what changed between the two",
    )
    _add_texts(
        inspect,
        "NAME=PATH",
        "texts by domain. Each row, and each plain text file, is a text of its own. Messages go through the chat template. A name "
        "may come several times.",
        required=True,
    )
    _add_sizes(inspect, seq_len=None, batch_size=8, max_tokens=True)
    inspect.add_argument(
        "--packing", action="store_true", help="join the texts of a domain by line ends and fill sequences with them"
    )
    inspect.add_argument("--top", type=int, default=5, help="specialists to list per domain (default: %(default)s)")
    inspect.add_argument(
        "--examples",
        type=int,
        default=3,
        help="texts per domain that the HTML report shows token by token (default: %(default)s)",
    )
    inspect.add_argument("--json", metavar="FILE", help="write all figures to FILE, or to standard output if it is -")
    inspect.add_argument("--html", metavar="FILE", help="write a report to FILE, one page with all its pictures")
    _add_loading(inspect).add_argument(
        "--ignore_phi_balance",
        action="store_true",
        help=f"ignore the selection bias in {STATE_NAME}, like a plain from_pretrained",
    )


def _add_place(commands: Any) -> None:
    place = commands.add_parser(
        "place",
        help="spread the experts of each layer over the ranks of expert parallelism, by their loads on your texts",
        description="Runs a MoE model over texts, and spreads the experts of each layer over ranks by their loads in one half of the "
        "sequences, equally many on each rank. Reports the load of the busiest rank over the mean on the other half, in the order of the "
        "checkpoint and as placed. The model is not changed.",
    )
    place.set_defaults(tuned=None, html=None, packing=False, ignore_phi_balance=False)
    place.add_argument("model", help=MODEL)
    _add_texts(place, "NAME=PATH", "texts like those the model will see, by domain.", required=True)
    place.add_argument("--ranks", type=int, required=True, help="number of ranks, a divisor of the number of experts")
    _add_sizes(place, seq_len=None, batch_size=8, max_tokens=True)
    place.add_argument(
        "--map", metavar="FILE", help="write the map for SGLang's --init-expert-location to FILE (.json)"
    )
    place.add_argument("--json", metavar="FILE", help="write all figures to FILE, or to standard output if it is -")
    _add_loading(place)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check whether a model is ready for balanced training: measured coefficient, problems, remedies",
        description="Loads a MoE model as for training, tries one optimizer step on a few texts, measures the coefficient in its "
        "gradient, and names problems with their remedies. Nothing is changed. Exit status: 0, 1 after a warning with --strict, 2 "
        "after a problem or an error.",
    )
    doctor.add_argument("model", help=MODEL)
    _add_texts(doctor, "PATH", "texts for the step (default: arithmetic problems).", field="FIELD")
    _add_sizes(doctor, seq_len=256, batch_size=4)
    doctor.add_argument("--accumulation", type=int, default=1, help="micro-batches per step (default: %(default)s)")
    doctor.add_argument(
        "--stock",
        action="store_true",
        help="examine the model's built-in auxiliary loss instead of balancing: which coefficient arrives at the routers, and why",
    )
    balancing = doctor.add_argument_group(
        "balancing (default: as the model was saved, or else the package's defaults)"
    )
    balancing.add_argument("--coef", type=float, help="coefficient of the price gradient")
    balancing.add_argument("--bias_coef", type=float, help="step size of the selection bias")
    balancing.add_argument("--method", help="another method than φ-balancing")
    balancing.add_argument("--token_mask", choices=("attention", "labels", "all"), help="tokens that count")
    balancing.add_argument(
        "--lora",
        nargs="+",
        metavar="OPTION=VALUE",
        help="train by LoRA: router=frozen|lora|full|router-only targets=all|experts|attention r=8",
    )
    doctor.add_argument("--json", metavar="FILE", help="write the report to FILE, or to standard output if it is -")
    doctor.add_argument("--strict", action="store_true", help="exit with 1 after a warning")
    _add_loading(doctor)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint for engines that do not know the selection bias, and measure what that costs",
        description="Turns a checkpoint that was saved while φ-balanced into one that vLLM, SGLang, llama.cpp or plain "
        "transformers loads. A selection bias that the model family does not have itself is folded into the router weights, "
        "folded and rebalanced, or dropped. All three are fitted on one part of the texts and measured on the other.",
    )
    export.add_argument("model", metavar="source", help=f"{MODEL}, saved while φ-balanced")
    export.add_argument("destination", help="a new or empty folder")
    _add_texts(
        export, "[NAME=]PATH", "texts like those the model will see. Needed if there is a bias to fold or drop."
    )
    export.add_argument(
        "--bias",
        choices=("fold", "rebalance", "drop"),
        default="fold",
        help="what to do with our selection bias (default: %(default)s)",
    )
    export.add_argument(
        "--max_loss_increase",
        type=float,
        default=0.01,
        help="refuse a larger increase of the loss per token (default: %(default)s)",
    )
    export.add_argument("--force", action="store_true", help="write the checkpoint whatever it costs")
    _add_sizes(export, seq_len=512, batch_size=8, max_tokens=True)
    export.add_argument("--json", metavar="FILE", help="write the figures to FILE, or to standard output if it is -")
    export.add_argument(
        "--no_check",
        action="store_true",
        help="do not load the result again to compare it, which needs the model's memory once more",
    )
    _add_loading(export)


def _add_watch(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        help="show the routers of a training that is going on: loads, MaxVio, dead experts, alerts",
        description="Shows what phb.watch(trainer) records, as the training goes on, until Ctrl-C. Where the output is no "
        "terminal, it shows one screen of plain text.",
    )
    watch.add_argument("folder", help="output_dir of the training")
    watch.add_argument("--once", action="store_true", help="show one screen with all layers and alerts, and end")
    watch.add_argument(
        "--html", metavar="FILE", help="write the page of `inspect` about the training so far to FILE, and end"
    )


def _add_upcycle(commands: Any) -> None:
    upcycle = commands.add_parser(
        "upcycle",
        help="make a MoE checkpoint of a dense one: experts that are copies of its MLPs, and new routers",
        description="Makes a Mixtral of a dense Llama or Mistral, a Qwen2-MoE of a Qwen2, a Qwen3-MoE of a Qwen3. Copies compute "
        "what the dense model computes. How much the result differs is measured on random tokens.",
    )
    upcycle.set_defaults(dtype="auto", device_map=None, trust_remote_code=False)
    upcycle.add_argument("model", metavar="source", help="folder or Hub name of a dense model, in safetensors files")
    upcycle.add_argument("destination", help="a new or empty folder")
    for name, default, text in (
        ("experts", 8, "experts of a layer"),
        ("top_k", 2, "experts of a token"),
        ("splits", 1, "cut each MLP into this many experts; exact if top_k is a multiple of it"),
        ("every", 1, "upcycle every n-th layer (Qwen)"),
        ("seed", 0, "seed of everything random"),
    ):
        upcycle.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    upcycle.add_argument(
        "--dense_layers",
        type=int,
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers that stay dense, from 0 (Qwen)",
    )
    for name, size, text in (
        ("router_std", 0.02, "standard deviation of the routers' weights"),
        ("noise", 0.0, "noise on the experts, as a share of the standard deviation of each matrix"),
        ("reinit", 0.0, "share of the neurons of each expert to draw anew (Drop-Upcycling)"),
        ("max_shard_gb", 5.0, "largest file of weights; so much memory is needed"),
    ):
        upcycle.add_argument(f"--{name}", type=float, default=size, help=f"{text} (default: %(default)s)")
    upcycle.add_argument(
        "--no_check", action="store_true", help="do not load both models, layer by layer, to compare them"
    )
    upcycle.add_argument("--json", metavar="FILE", help="write the report to FILE, or to standard output if it is -")
    upcycle.add_argument("--revision", help="branch, tag or commit on the Hub")
    upcycle.add_argument("--tokenizer", help="folder or Hub name of the tokenizer (default: the model's)")


def _add_texts(command: Any, metavar: str, text: str, field: str = "[NAME=]FIELD", required: bool = False) -> None:
    command.add_argument("--texts", nargs="+", required=required, default=[], metavar=metavar, help=f"{text} {PATHS}")
    usual = "text; messages; prompt and completion; question and answer; or the only one with text"
    command.add_argument(
        "--field", nargs="+", default=[], metavar=field, help=f"fields of a row to use as its text (default: {usual})"
    )


def _add_sizes(command: Any, seq_len: int | None, batch_size: int, max_tokens: bool = False) -> None:
    if max_tokens:
        command.add_argument(
            "--max_tokens",
            type=int,
            default=1 << 16,
            help="tokens to read per domain, 0 for all (default: %(default)s)",
        )
    default = seq_len or "512, or less if the model takes less"
    command.add_argument(
        "--seq_len", type=int, default=seq_len, help=f"longest sequence in tokens (default: {default})"
    )
    command.add_argument(
        "--batch_size", type=int, default=batch_size, help="sequences per forward (default: %(default)s)"
    )


def _add_loading(command: Any) -> Any:
    loading = command.add_argument_group("loading the model")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    loading.add_argument("--dtype", choices=dtypes, default="auto", help="(default: %(default)s, the checkpoint's)")
    loading.add_argument(
        "--device_map",
        help="as in from_pretrained, e.g. auto, cpu or cuda:0 (default: auto if there is an accelerator)",
    )
    loading.add_argument("--revision", help="branch, tag or commit on the Hub, of the first model if there are two")
    loading.add_argument("--tokenizer", help="folder or Hub name of the tokenizer (default: the model's)")
    loading.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    return loading
