"""
Training: φ-balancing inside a `Trainer`, and which parameters an adapter trains. Knows trainers.

| module | what it holds |
|---|---|
| `callback` | when the duals move, what is logged and kept with a checkpoint |
| `attaching` | what has to be wired into the trainer itself |
| `examining` | the doctor: a set-up examined by one optimizer step |
| `refusals` | ways of training in which the coefficient would not be what it says |
| `checkpoints` | in what order a checkpoint is written, and from which one a run resumes |
| `adapters` | LoRA configurations of a model, from two words |
"""

from .adapters import lora_config
from .attaching import attach
from .callback import PhiBalanceCallback
from .checkpoints import last_checkpoint
from .examining import doctor


__all__ = ["PhiBalanceCallback", "attach", "doctor", "last_checkpoint", "lora_config"]
