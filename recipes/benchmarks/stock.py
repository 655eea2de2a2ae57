"""
Measures which coefficient of the built-in auxiliary loss arrives, in stock trainers on tiny random models, by `phb.audit`.

    python recipes/benchmarks/stock.py                                        # all rows; a few minutes on 2 CPU cores, no network
    python recipes/benchmarks/stock.py --tool SFTTrainer --family mixtral     # one row, with its findings

Without options, it writes `stock.json` beside this script and the tables of `guides/AUDIT.md` that follow from it. Each row is a tool
and a family, each column a way to train. 11 padded rows of unequal length, two per micro-batch. In "SFTTrainer, published", the config has
the coefficient of a published checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from invariance import build_model, build_rows, build_tokenizer, collate, in_ranks, prepare_process

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable, versions


HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "stock.json", HERE.parent / "guides" / "AUDIT.md"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "4 micro-batches": {"gradient_accumulation_steps": 4},
    "2 ranks": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "no mask": {},
}
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3", "llama4_text")
TOOLS = ("Trainer", "SFTTrainer")
ROWS = [
    ("Trainer, as it comes", "mixtral"),
    *((tool, family) for tool in TOOLS for family in FAMILIES),
    ("Trainer, LoRA", "mixtral"),
    ("SFTTrainer, LoRA", "mixtral"),
    ("DPOTrainer, LoRA", "mixtral"),
    ("DPOTrainer, LoRA", "qwen3_moe"),
]
# Published checkpoints and `router_aux_loss_coef` in their config.json.
PUBLISHED = {
    "mixtral": ("mistralai/Mixtral-8x7B-v0.1", 0.02),
    "qwen2_moe": ("Qwen/Qwen1.5-MoE-A2.7B", 0.001),
    "qwen3_moe": ("Qwen/Qwen3-30B-A3B", 0.001),
    "olmoe": ("allenai/OLMoE-1B-7B-0924", 0.01),
    "gpt_oss": ("openai/gpt-oss-20b", 0.9),
}
DEFAULTS = [("SFTTrainer, published", family) for family in PUBLISHED]  # rows of the other table


def without_mask(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads without saying so."""
    return {name: part for name, part in collate(rows).items() if name != "attention_mask"}


def make_trainer(tool: str, family: str, setting: str, folder: str) -> Any:
    """Returns a trainer on a tiny model of `family`, with the loss switched on where the tool does not do it."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    name, _, kind = tool.partition(", ")
    options = {"router_aux_loss_coef": PUBLISHED[family][1]} if kind == "published" else {}
    model: Any = build_model(family, **options)
    if name == "Trainer" and kind != "as it comes":
        model.config.output_router_logits = True
    if kind == "LoRA":
        from peft import get_peft_model

        model = get_peft_model(model, phb.lora_config(model, router="lora"))
    arguments = {
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
        **SETTINGS[setting],
    }
    if name == "Trainer":
        args = TrainingArguments(folder, **arguments)
        pad = without_mask if setting == "no mask" else collate
        return Trainer(model, args, train_dataset=build_rows(), data_collator=pad, processing_class=build_tokenizer())
    arguments["bf16"] = False
    if name == "SFTTrainer":
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, **arguments}
        data, args = Dataset.from_list(build_rows()), SFTConfig(folder, **options)
        pad = {"data_collator": without_mask} if setting == "no mask" else {}
        return SFTTrainer(model, args, train_dataset=data, processing_class=build_tokenizer(), **pad)
    words = [" ".join(map(str, row["input_ids"])) for row in build_rows()]
    pairs = [{"prompt": f"{a} ", "chosen": b, "rejected": c} for a, b, c in zip(words, words[1:], words[2:])]
    data = Dataset.from_list(pairs)
    return DPOTrainer(
        model, args=DPOConfig(folder, **arguments), train_dataset=data, processing_class=build_tokenizer()
    )


def measure(tool: str, family: str, setting: str) -> dict[str, Any]:
    """Returns what the audit found in one cell; the message, if the tool refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = phb.audit(make_trainer(tool, family, setting, folder))
        except Exception as error:  # of the tool
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    found = {check.name: check.finding for check in report.checks if check.status != "ok"}
    return {"declared": report.declared, "received": report.received, "findings": found}


def measure_rows(rows: Iterable[tuple[str, str]], settings: Iterable[str]) -> list[dict[str, Any]]:
    """Measures all cells of `rows` and `settings` in the present process (group)."""
    prepare_process()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return [
        {"tool": tool, "family": family, "setting": setting, **measure(tool, family, setting)}
        for tool, family in rows
        for setting in settings
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Returns the table: received coefficients, in bold where they are not the declared ones."""
    lines = [["tool", "family", "declared", *SETTINGS, "`python recipes/benchmarks/stock.py ...`"]]
    lines.append(["---"] * 2 + ["---:"] * (len(SETTINGS) + 1) + ["---"])
    for tool, family in ROWS:
        cells = {cell["setting"]: cell for cell in results if (cell["tool"], cell["family"]) == (tool, family)}
        plain = cells["plain"]
        shown = [_shown(cells[setting]) if setting in cells else "" for setting in SETTINGS]
        declared = f"{plain['declared']:g}" if plain.get("declared") else "none"
        lines.append([tool, f"`{family}`", declared, *shown, f'`--tool "{tool}" --family {family}`'])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def defaults_table(results: list[dict[str, Any]]) -> str:
    """Returns the table of what TRL applies by default: coefficients of the class and of a checkpoint, and what arrives."""
    cells = {(cell["tool"], cell["family"]): cell for cell in results if cell["setting"] == "non-reentrant"}
    lines = [["checkpoint", "family", "default of the class", "config.json", "received by default"]]
    lines.append(["---", "---", "---:", "---:", "---:"])
    for tool, family in DEFAULTS:
        name, coef = PUBLISHED[family]
        of_class, received = cells["SFTTrainer", family]["declared"], cells[tool, family]["received"]
        lines.append([f"`{name}`", f"`{family}`", f"{of_class:g}", f"{coef:g}", f"{received:.2g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(cell: dict[str, Any]) -> str:
    if "error" in cell:
        return "fails"
    text = f"{cell['received']:.2g}"
    is_exact = abs(cell["received"] - cell["declared"]) <= 1e-3 * abs(cell["declared"])
    return text if is_exact else f"**{text}**"


def updated(page: str, results: list[dict[str, Any]]) -> str:
    """Returns `page` with the tables of `results`."""
    for name, made in (("audit", table(results)), ("defaults", defaults_table(results))):
        page = re.sub(rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{made}\g<2>", page)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", help=f"one of {', '.join(dict(ROWS + DEFAULTS))}")
    parser.add_argument("--family", help="a model type of transformers")
    args = parser.parse_args()
    if (args.tool is None) != (args.family is None):
        parser.error("give --tool and --family, or neither")
    rows = ROWS if args.tool is None else [(args.tool, args.family)]
    alone = [setting for setting in SETTINGS if setting != "2 ranks"]
    results = measure_rows(rows, alone) + in_ranks(measure_rows, 2, rows, ["2 ranks"])[0]
    if args.tool is not None:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return 0
    results += measure_rows(DEFAULTS, ["non-reentrant"])  # TRL checkpoints this way by default
    rows, order = ROWS + DEFAULTS, list(SETTINGS)
    results.sort(key=lambda cell: (rows.index((cell["tool"], cell["family"])), order.index(cell["setting"])))
    cells = [json.dumps(cell | {"findings": list(cell.get("findings", []))}) for cell in results]
    lines = ",\n  ".join(cells)
    RESULTS.write_text(f'{{"versions": {json.dumps(versions())}, "cells": [\n  {lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{table(results)}\n{defaults_table(results)}")
    return 0


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
