"""One optimizer step, carried out: by `Trainer`, by TRL's `SFTTrainer`, and by a loop as users write it."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_phibalance as phb

from .cells import Cell
from .definition import flat_gradient, reference
from .inputs import AUX_COEF, COEF, build_model, build_rows, build_tokenizer, collate, deal, padded_length


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


def trainer_run(cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer, use_cpu: bool = True) -> None:
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
            use_cpu=use_cpu,
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
