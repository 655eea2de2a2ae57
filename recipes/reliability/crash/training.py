"""The run: a tiny Mixtral with dropout, in a process that may die."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from hf_phibalance import attach, get_balancer, last_checkpoint, patch  # now, not in each process anew
from hf_phibalance.files import STATE_NAME


if TYPE_CHECKING:
    from .traps import Trap


STEPS, EVERY, ACCUMULATION, VOCAB = 6, 2, 2, 512
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_dropout": 0.1,
}


def rows(count: int = 80) -> list[dict[str, list[int]]]:
    """Token sequences of unequal lengths, of few tokens and many, so that loads are uneven."""
    rng = random.Random(0)
    drawn = [[int(VOCAB * rng.random() ** 2) for _ in range(rng.randint(4, 24))] for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def build_trainer(folder: Path, seed: int, keep: int | None) -> Trainer:
    """An attached trainer that writes into `folder`; `seed` of the weights, which a checkpoint has to overwrite."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**FIELDS))
    patch(model, {"coef": 0.5, "bias_coef": 0.05})
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=0.01,
        save_steps=EVERY,
        save_total_limit=keep,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), data_collator=collate)
    attach(trainer)
    return trainer


def train(output: Path, home: Path, rank: int, ranks: int, port: int, trap: Trap | None, keep: int | None) -> None:
    """Starts the run in `output`, or resumes it, and leaves in `home` what it ended with."""
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        newest = last_checkpoint(output)
        trainer = build_trainer(output, seed=0 if newest is None else 1, keep=keep)
        seconds = clock(trainer) if trap is None else trap.set(trainer, 0 if newest is None else step_of(newest))
        trainer.train(resume_from_checkpoint=newest is not None)
        torch.save(outcome(trainer), home / f"end-{rank}.pt")
        (home / f"seconds-{rank}.json").write_text(json.dumps(seconds))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if trap is not None and trap.by_parent:
        signal.pause()  # the kill is on its way
    os._exit(0)  # as a kill would; nothing is left to do


def outcome(trainer: Trainer) -> dict[str, Any]:
    balancer = get_balancer(trainer.model)
    return {
        "step": trainer.state.global_step,
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "schedule": trainer.lr_scheduler.state_dict(),
        "duals": balancer.state_dict(),
        "prices": balancer.prices(),
        "random": [torch.random.get_rng_state(), np.random.get_state(), random.getstate()],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def clock(trainer: Trainer) -> dict[str, float]:
    """Seconds that the slowest writing of a checkpoint, and of the duals, took: what random times are drawn from."""
    seconds = {"checkpoint": 0.0, "state": 0.0}

    def time_calls(what: str, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            begun = time.perf_counter()
            method(*args, **kwargs)
            seconds[what] = max(time.perf_counter() - begun, seconds[what])

        setattr(owner, name, timed)

    time_calls("checkpoint", trainer, "_save_checkpoint")
    time_calls("state", get_balancer(trainer.model), "save")
    return seconds


def step_of(checkpoint: str | Path) -> int:
    return int(str(checkpoint).rpartition("-")[2])


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """All that a run resumes from, by file."""
    tensors = [*checkpoint.glob("*.safetensors"), checkpoint / STATE_NAME]
    contents: dict[str, Any] = {path.name: load_file(path) for path in tensors}
    for path in checkpoint.glob("*.pt*"):  # .pt and .pth
        contents[path.name] = torch.load(path, weights_only=False)
    return contents | {"step": json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]}
