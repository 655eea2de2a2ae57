"""
On PYTHONPATH it notes what a model and its optimizer get in any command that trains with transformers' `Trainer`: for each
optimizer step and rank, `$RECORD_TO/STEP-RANK.pt` holds the inputs of the training forwards, and the gradients. With `$AUDIT`, it
writes `$RECORD_TO/audit.json` instead: what `phb.audit` finds before the training.
"""

import importlib.abc
import importlib.util
import os
import sys


class TrainerFinder(importlib.abc.MetaPathFinder):
    """Lets the module of `Trainer` be imported as ever, and then lets the class record."""

    def find_spec(self, name, path, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_record(module):
            execute(module)
            (audit if "AUDIT" in os.environ else record)(module.Trainer)

        spec.loader.exec_module = execute_and_record
        return spec


def record(trainer_class):
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    training_step, forwards = trainer_class.training_step, []

    def note_inputs(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            forwards.append({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    def recording_step(trainer, *args, **kwargs):
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not hasattr(trainer, "_records"):
            trainer._records = True
            model.register_forward_pre_hook(note_inputs, with_kwargs=True)
            register_optimizer_step_pre_hook(write)
            write.trainer, write.model = trainer, model
        return training_step(trainer, *args, **kwargs)

    def write(optimizer, args, kwargs):
        step, rank = write.trainer.state.global_step + 1, write.trainer.args.process_index
        named = write.model.named_parameters()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named if p.requires_grad}
        torch.save({"forwards": forwards, "gradients": gradients}, f"{os.environ['RECORD_TO']}/{step}-{rank}.pt")
        forwards.clear()

    trainer_class.training_step = recording_step


def audit(trainer_class):
    train = trainer_class.train

    def audited(trainer, *args, **kwargs):
        trainer_class.train = train
        import json

        import hf_phibalance as phb

        report = phb.audit(trainer)
        with open(f"{os.environ['RECORD_TO']}/audit.json", "w") as file:
            json.dump(report.to_dict(), file)
        return trainer.train(*args, **kwargs)

    trainer_class.train = audited


if "RECORD_TO" in os.environ:
    sys.meta_path.insert(0, TrainerFinder())
