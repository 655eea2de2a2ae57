"""
Examines trainers by `phb.attach(trainer, verify=True)`: what coefficient does it measure in each, how long does training with it
take, and is what was planted found?

Usage:

    python recipes/reliability/doctor.py
    python recipes/reliability/doctor.py --trainers "SFT packed" GRPO --accumulation 1 8

Made-up models and texts, no network; two minutes on one core. Exits with 1 if a sound trainer is off by more than 1e-4
without a warning that says why, or a planted fault is not reported.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable
from hf_phibalance.models import build_model, train_tokenizer
from hf_phibalance.tasks import make_splits


BOUND = 1e-4
COEF = 0.01
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
PROBLEMS = make_splits(32)["train"]


class HalvesGradients(SFTTrainer):
    """The planted fault: a training step of one's own that changes gradients."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        return loss


def pad(rows):
    """As a collator that pads on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def longer(completions, **columns):
    """Reward: the number of characters."""
    return [float(len(completion)) for completion in completions]


def make_trainer(name, model, tokenizer, folder, accumulation):
    common = {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,  # prices begin with the second
        "report_to": [],
        "disable_tqdm": True,
    }
    trl = {**common, "bf16": False}
    sft = [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in PROBLEMS]
    if name == "Trainer":
        data = [{"input_ids": tokenizer(row["question"])["input_ids"]} for row in PROBLEMS]
        return Trainer(model, TrainingArguments(**common), train_dataset=data, data_collator=pad)
    if name.startswith("SFT") or name == "planted: half of every gradient":
        options = {
            "SFT packed": {"packing": True, "max_length": 128, "packing_strategy": "bfd"},
            "SFT padding-free, NEFTune": {"padding_free": True, "max_length": None, "neftune_noise_alpha": 5.0},
        }.get(name, {})
        cls, arguments = (SFTTrainer if name.startswith("SFT") else HalvesGradients), SFTConfig(**trl, **options)
        return cls(model, args=arguments, train_dataset=Dataset.from_list(sft), processing_class=tokenizer)
    if name == "DPO":
        data = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " 0"} for r in sft]
        arguments = DPOConfig(**trl)
        return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    cls, config = (GRPOTrainer, GRPOConfig) if name == "GRPO" else (RLOOTrainer, RLOOConfig)
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in sft])
    arguments = config(**trl, num_generations=2, max_completion_length=8)
    return cls(model, reward_funcs=longer, args=arguments, train_dataset=data, processing_class=tokenizer)


TRAINERS = (
    "Trainer",
    "SFT",
    "SFT packed",
    "SFT padding-free, NEFTune",
    "DPO",
    "GRPO",
    "RLOO",
    "planted: half of every gradient",
)


def examine(name, accumulation, tokenizer):
    """The report on the step that training takes, and the seconds that training took."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = build_model("mixtral", FIELDS, tokenizer).train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = folder  # where GRPO and RLOO look for a tokenizer
        trainer = make_trainer(name, phb.patch(model, {"coef": COEF}), tokenizer, folder, accumulation)
        trainer.remove_callback(PrinterCallback)
        callback = phb.attach(trainer, verify=True)
        start = time.perf_counter()
        with contextlib.suppress(ValueError):  # training ends where something is wrong
            trainer.train()
        return callback.report, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Examines the steps of trainers by phb.attach(trainer, verify=True).")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    tokenizer = train_tokenizer([f"{row['question']} {row['answer']}" for row in PROBLEMS], vocab_size=300)
    names = ("torch", "transformers", "trl", "accelerate")
    table = Table(title=", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    for column in ("trainer", "micro-batches", "status", "ratio", "residual", "train(verify), s"):
        table.add_column(column)
    wrong = 0
    for name in args.trainers:
        for accumulation in args.accumulation:
            report, seconds = examine(name, accumulation, tokenizer)
            found = report.coefficient
            if name.startswith("planted"):
                wrong += not any(check.name == "coefficient" for check in report.problems)
            else:
                off = found is None or abs(found.ratio - 1) > BOUND
                wrong += bool(report.problems) or (off and report.status == "ok")
            figures = ("", "") if found is None else (f"{found.ratio:.6f}", f"{found.residual:.0e}")
            table.add_row(name, str(accumulation), report.status, *figures, f"{seconds:.1f}")
    Console(width=110).print(table)
    print(f"{wrong} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
