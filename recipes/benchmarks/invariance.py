# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
"""
Invariance matrix: does one optimizer step receive the declared coefficient, however the step is carried out?

16 padded rows of very different length are one optimizer step. They are trained on in every combination of

    trainer            Trainer, SFTTrainer, raw loop
    checkpointing      none, non-reentrant, reentrant
    precision          fp32, bf16 autocast
    accumulation       1, 2, 4, 8 micro-batches of unequal numbers of rows and tokens
    ranks              1, and 2 real gloo processes

and for each the gradient that reaches the optimizer (before clipping) is compared with the definition: the autograd
gradient g_ref of Σ_layers mean_tokens ⟨q, p⟩, written out naively on the unpatched model, in fp32, in one forward over
all rows. With g the gradient of the balanced model and g_0 that of the plain one,

    effective / declared = ⟨g - g_0, g_ref⟩ / (coef ⟨g_ref, g_ref⟩)        what the table shows, 1 if exact
    residual             = |g - g_0 - coef g_ref| / |coef g_ref|           0 if every component is exact

The last rows show the same projection, over the router parameters, for the model's own auxiliary loss under the stock
`Trainer`: its gradient on the same split over that of one forward over all rows.

Usage:

    python recipes/benchmarks/invariance.py
    python recipes/benchmarks/invariance.py --model_type qwen3_moe --json invariance.json

Takes one and a half minutes on 2 CPU cores, needs no network. Exits with 1 if a cell is out of bounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_phibalance as phb


TRAINERS = ("Trainer", "SFTTrainer", "raw loop")
CHECKPOINTING = ("none", "non-reentrant", "reentrant")
PRECISIONS = ("fp32", "bf16")
ACCUMULATION = (1, 2, 4, 8)
RANKS = (1, 2)

COEF = 5.0  # large, so that g - g_0 is no difference of nearly equal numbers
AUX_COEF = 5.0
RATIO_BOUND = {"fp32": 1e-4, "bf16": 1e-2}
RESIDUAL_BOUND = {"fp32": 1e-4, "bf16": 1e-2}

ROWS, LONGEST, PAD, VOCAB = 16, 48, 0, 96
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Cell:
    """One way to carry out the optimizer step; `balancing` is `"phi"`, `"built-in"` or `"none"`."""

    trainer: str
    checkpointing: str
    precision: str
    accumulation: int
    ranks: int
    balancing: str = "phi"
    token_mask: str = "attention"


@dataclass(frozen=True)
class Result:
    """What a cell showed: effective over declared coefficient, and the relative residual."""

    cell: Cell
    ratio: float
    residual: float

    @property
    def ok(self) -> bool:
        if self.cell.balancing != "phi":
            return True
        precision = self.cell.precision
        return abs(self.ratio - 1) <= RATIO_BOUND[precision] and self.residual <= RESIDUAL_BOUND[precision]


def all_cells() -> list[Cell]:
    """The full matrix, and the rows of the built-in loss."""
    balanced = [Cell(*axes) for axes in itertools.product(TRAINERS, CHECKPOINTING, PRECISIONS, ACCUMULATION, RANKS)]
    stock = itertools.product(["Trainer"], CHECKPOINTING, ["fp32"], ACCUMULATION, RANKS, ["built-in"])
    return balanced + [Cell(*axes) for axes in stock]


# ---------------------------------------------------------------------- model and data, the same in every process


def build_model(model_type: str, built_in: bool = False) -> nn.Module:
    """A tiny model from scratch; with `built_in` its own auxiliary loss is on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(model_type)
    fields = {name: value for name, value in FIELDS.items() if hasattr(known, name)}
    config = AutoConfig.for_model(model_type, **fields)
    if built_in:
        config.output_router_logits, config.router_aux_loss_coef = True, AUX_COEF
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # a wider spread than a fresh model has, so that routing is not nearly tied
                nn.init.normal_(parameter, std=0.15)
        with torch.no_grad():  # tokens have something in common, so that the routers are out of balance
            embedding = model.get_input_embeddings().weight
            embedding += torch.randn(embedding.shape[-1])
    return model.train()


def build_rows() -> list[dict[str, list[int]]]:
    """Prompt and completion of each row as token ids; the loss is on the completion alone."""
    rng = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = [rng.randrange(3, VOCAB) for _ in range(rng.randint(4, LONGEST))]
        prompt = rng.randrange(1, len(ids) - 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def deal(parts: int) -> list[list[int]]:
    """The indices of all rows in `parts` micro-batches of unequal size, none of them empty."""
    rng = random.Random(parts)
    order = rng.sample(range(ROWS), ROWS)
    batches = [[row] for row in order[:parts]]
    for row in order[parts:]:
        batches[int(parts * rng.random() ** 2)].append(row)  # the first ones get most
    return batches


def collate(rows: Sequence[dict[str, list[int]]], length: int | None = None) -> dict[str, Tensor]:
    """Pads on the right, to the longest of `rows` unless a `length` is given."""
    length = length or max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ids = pad("input_ids", PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": pad("labels", -100)}


def padded_length(token_mask: str) -> int | None:
    """Where padding counts as well, there has to be equally much of it in every split."""
    return LONGEST if token_mask == "all" else None


# ---------------------------------------------------------------------- the definition, written out


@dataclass(frozen=True)
class Reference:
    """Duals, and the gradients of one forward over all rows as flat vectors over all parameters."""

    duals: dict[str, Tensor]
    phi: Tensor
    built_in: Tensor
    is_router: Tensor  # (number of parameters,) which entries belong to routers


@functools.cache
def reference(model_type: str, token_mask: str = "attention") -> Reference:
    """The definition at random prices: autograd on the unpatched model, from the logits that its routers return."""
    model = build_model(model_type)
    duals, prices = random_duals(model)
    scoring = phb.supported_families()[model_type].scoring
    logits: dict[str, Tensor] = {}
    recorder = model._can_record_outputs["router_logits"]
    index = getattr(recorder, "index", 0)
    for name in prices:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, output, name=name: logits.update({name: output[index]}))
    batch = collate(build_rows(), LONGEST)
    model(**batch)
    mask = {
        "attention": batch["attention_mask"],
        "labels": batch["labels"] != -100,
        "all": torch.ones_like(batch["labels"]),
    }[token_mask]
    counted = mask.reshape(-1).bool()
    term = torch.zeros(())
    for name, price in prices.items():
        scores = logits[name].softmax(-1) if scoring == "softmax" else logits[name].sigmoid()
        probs = scores / scores.sum(-1, keepdim=True)
        term = term + (probs[counted] @ price).mean()
    term.backward()
    phi = flat_gradient(model)
    is_router = torch.cat(
        [torch.full((p.numel(),), name.rpartition(".")[0] in prices) for name, p in model.named_parameters()]
    )
    return Reference(duals, phi, built_in_gradient(model_type, batch), is_router)


def random_duals(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Duals of a patched `model` with non-zero prices, and these prices; `model` is left unpatched."""
    phb.patch(model, {"coef": COEF})
    balancer = phb.get_balancer(model)
    generator = torch.Generator().manual_seed(0)
    duals = balancer.state_dict()
    for name, value in duals.items():
        duals[name] = torch.tensor(1) if name == "steps" else torch.randn(value.shape, generator=generator).softmax(-1)
    balancer.load_state_dict(duals)
    prices = balancer.prices()
    phb.unpatch(model)
    return duals, prices


def built_in_gradient(model_type: str, batch: dict[str, Tensor]) -> Tensor:
    """Gradient of the model's own auxiliary loss, its coefficient included; zero if the family has none."""
    model = build_model(model_type, built_in=True)
    loss = getattr(model(**batch), "aux_loss", None)
    if loss is not None:
        (AUX_COEF * loss).backward()
    return flat_gradient(model)


def flat_gradient(model: nn.Module) -> Tensor:
    """Gradients of all parameters in one fp64 vector; parameters without one count as zero."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).detach().reshape(-1).double() for p in model.parameters()]
    )


# ---------------------------------------------------------------------- one optimizer step, carried out


class Recorder(torch.optim.SGD):
    """An optimizer that notes the gradient it is handed and leaves the weights alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.model = model
        self.gradient = torch.empty(0)

    def step(self, closure=None) -> None:
        self.gradient = flat_gradient(self.model)


def optimizer_gradient(cell: Cell, model_type: str) -> Tensor:
    """The gradient that the optimizer receives when `cell` trains on all rows."""
    model = build_model(model_type, built_in=cell.balancing == "built-in")
    if cell.balancing == "phi":
        phb.patch(model, {"coef": COEF, "token_mask": cell.token_mask})
        phb.get_balancer(model).load_state_dict(reference(model_type, cell.token_mask).duals)
    optimizer = Recorder(model)
    (raw_loop if cell.trainer == "raw loop" else trainer_run)(cell, model, optimizer)
    return optimizer.gradient


def trainer_run(cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of `Trainer` or `SFTTrainer`, whose batches accelerate deals to the ranks."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PrinterCallback, Trainer, TrainingArguments

    balanced = cell.balancing == "phi"
    length = padded_length(cell.token_mask)
    base, arguments, settings = Trainer, TrainingArguments, {}
    more: dict[str, Any] = {"train_dataset": build_rows(), "data_collator": functools.partial(collate, length=length)}
    if cell.trainer == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        base, arguments = SFTTrainer, SFTConfig
        more = {"processing_class": build_tokenizer(), "train_dataset": Dataset.from_list(build_rows())}
        settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "pad_to_multiple_of": length}
        # TRL adds an auxiliary loss of its own to every model that can return its router logits: attach has to see to it
        adds_loss = balanced and hasattr(model.config, "output_router_logits")
        settings["router_aux_loss_coef"] = AUX_COEF if adds_loss else 0.0

    class Dealt(base):
        def get_train_dataloader(self) -> DataLoader:
            batches = deal(cell.accumulation * cell.ranks)
            loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=1,
            gradient_accumulation_steps=cell.accumulation,
            gradient_checkpointing=cell.checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": cell.checkpointing == "reentrant"},
            bf16=cell.precision == "bf16",
            max_grad_norm=0.0,
            accelerator_config={"even_batches": False},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = Dealt(model=model, args=args, optimizers=(optimizer, None), **more)
        trainer.remove_callback(PrinterCallback)
        if balanced:
            phb.attach(trainer)
        trainer.train()


@functools.cache
def build_tokenizer() -> Any:
    """What `SFTTrainer` wants to see; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *map(str, range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def set_checkpointing(model: nn.Module, checkpointing: str, **options: Any) -> None:
    if checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"}, **options)


def raw_loop(cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of a loop as users write it."""
    set_checkpointing(model, cell.checkpointing)
    rank = dist.get_rank() if cell.ranks > 1 else 0
    rows, length = build_rows(), padded_length(cell.token_mask)
    parts = deal(cell.accumulation * cell.ranks)[rank :: cell.ranks]
    batches = [collate([rows[i] for i in part], length) for part in parts]
    runner = nn.parallel.DistributedDataParallel(model) if cell.ranks > 1 else model
    balancer = phb.get_balancer(model) if cell.balancing == "phi" else None
    if balancer is not None:
        balancer.begin_step(batches)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or cell.ranks == 1 else runner.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=cell.precision == "bf16"):
                loss = runner(**batch).loss / len(batches)
            loss.backward()
    optimizer.step()
    if balancer is not None:
        balancer.step()


# ---------------------------------------------------------------------- the matrix


@functools.cache
def plain_gradient(cell: Cell, model_type: str) -> Tensor:
    return optimizer_gradient(cell, model_type)


def measure(cell: Cell, model_type: str) -> Result:
    """Projection and residual of one cell, in the present process (group)."""
    expected = reference(model_type, cell.token_mask)
    plain = plain_gradient(dataclasses.replace(cell, balancing="none", token_mask="attention"), model_type)
    added = optimizer_gradient(cell, model_type) - plain
    if cell.balancing == "phi":
        declared = COEF * expected.phi
    else:
        added, declared = added[expected.is_router], expected.built_in[expected.is_router]
    ratio = float(added @ declared / (declared @ declared))
    return Result(cell, ratio, float((added - declared).norm() / declared.norm()))


def measure_all(cells: Iterable[Cell], model_type: str) -> list[Result]:
    """Measures `cells`, all of the same number of ranks, in the present process (group)."""
    from tqdm.auto import tqdm

    prepare_process()
    cells = list(cells)
    rank = int(os.environ.get("RANK", 0))
    bar = tqdm(cells, desc=f"{cells[0].ranks} rank(s)", unit="cell", disable=rank != 0)
    return [measure(cell, model_type) for cell in bar]


def prepare_process() -> None:
    """Silences the trainers, whose notices would drown the progress bar, and makes the start of each quick."""
    import trl.trainer.sft_trainer  # noqa: F401  # before the freeze
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    gc.freeze()  # every trainer begins with a garbage collection, which would take most of the time


def in_ranks(function: Callable, ranks: int, *args: Any) -> list[Any]:
    """
    Runs `function(*args)` in `ranks` gloo processes on this machine.

    `function` has to be importable (it is pickled by name) and its result plain data (tensors die with their process).

    Returns:
        `list`: what it returned, by rank.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1,
        1,
        ranks,
        run_id="here",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    results = elastic_launch(config, _in_group)(function, *args)
    return [results[rank] for rank in range(ranks)]


def _in_group(function: Callable, *args: Any) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------- report


def markdown(results: Sequence[Result]) -> str:
    """The table for the README: a row for each trainer, checkpointing and precision, a column for each split."""
    splits = list(itertools.product(RANKS, ACCUMULATION))
    head = ["training", "checkpointing", "precision", *(f"{r}×{a}" for r, a in splits)]
    lines = [head, ["---"] * 3 + ["--:"] * len(splits)]
    rows: dict[tuple, dict[tuple, Result]] = {}
    for result in results:
        cell = result.cell
        key = (cell.balancing, cell.trainer, cell.checkpointing, cell.precision)
        rows.setdefault(key, {})[cell.ranks, cell.accumulation] = result
    for (balancing, trainer, checkpointing, precision), row in rows.items():
        name = trainer if balancing == "phi" else f"{trainer}, built-in loss"
        lines.append([name, checkpointing, precision, *(show(row.get(split)) for split in splits)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(result: Result | None) -> str:
    if result is None:
        return ""
    if result.cell.balancing != "phi":
        return f"{abs(result.ratio):.2f}"
    return f"{result.ratio:.4f}" if result.ok else f"**{result.ratio:.4f}**"


def environment() -> dict[str, str]:
    """Machine and versions."""
    import accelerate
    import transformers
    import trl

    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} CPU cores", "python": platform.python_version()}
    return machine | {module.__name__: module.__version__ for module in (torch, transformers, trl, accelerate)}


def summary(results: Sequence[Result]) -> str:
    """Worst deviation and residual for each precision."""
    lines = []
    for precision in PRECISIONS:
        chosen = [r for r in results if r.cell.precision == precision and r.cell.balancing == "phi"]
        deviation = max(abs(r.ratio - 1) for r in chosen)
        residual = max(r.residual for r in chosen)
        lines.append(
            f"{precision}: {len(chosen)} cells, largest |effective/declared - 1| {deviation:.1e} (bound "
            f"{RATIO_BOUND[precision]:g}), largest residual {residual:.1e} (bound {RESIDUAL_BOUND[precision]:g})"
        )
    return "\n".join(lines)


def unsuitable(model_type: str) -> str | None:
    """Why a model type cannot be measured here, `None` if it can."""
    family = phb.supported_families().get(model_type)
    if family is None:
        return "it declares no router logits"
    if family.refused or family.scoring not in ("softmax", "sigmoid"):
        return family.refused or f"its routing probabilities ({family.scoring}) are not written out here"
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in build_model(model_type).parameters())
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be built from the fields in FIELDS ({error})"
    return None if size < 10**6 else f"with the fields in FIELDS it still has {size:,} parameters"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures that the price gradient is invariant to how a step is run.")
    parser.add_argument("--model_type", default="mixtral", help="a causal-LM model type of transformers")
    parser.add_argument("--json", metavar="FILE", help="write every cell there as well")
    args = parser.parse_args()
    if (problem := unsuitable(args.model_type)) is not None:
        parser.error(f"--model_type {args.model_type}: {problem}; choose another one, such as mixtral")
    torch.set_num_threads(1)
    cells = all_cells()
    if not hasattr(build_model(args.model_type).config, "router_aux_loss_coef"):
        cells = [cell for cell in cells if cell.balancing == "phi"]
    results = measure_all([cell for cell in cells if cell.ranks == 1], args.model_type)
    for ranks in RANKS[1:]:
        results += in_ranks(measure_all, ranks, [cell for cell in cells if cell.ranks == ranks], args.model_type)[0]
    print(f"\n{args.model_type}; columns: ranks × accumulation steps; ", end="")
    print(", ".join(f"{name} {value}" for name, value in environment().items()), "\n")
    print(markdown(results), "\n", summary(results), sep="\n")
    if args.json:
        rows = [dataclasses.asdict(r.cell) | {"ratio": r.ratio, "residual": r.residual} for r in results]
        with open(args.json, "w") as file:
            json.dump({"model_type": args.model_type, "environment": environment(), "cells": rows}, file, indent=1)
    failed = [r for r in results if not r.ok]
    for result in failed:
        print(f"OUT OF BOUNDS: {result}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
