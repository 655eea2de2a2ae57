"""
Training: φ-balancing inside a `Trainer`, and which parameters an adapter trains. Knows trainers.

| module | what it holds |
|---|---|
| `attaching` | wraps the methods of a trainer |
| `callback` | ends optimizer steps, logs, restores the duals of a checkpoint |
| `checkpoints` | the order in which a checkpoint is written, and which one a run resumes from |
| `batches` | batches before they are trained on: calibration, and generated text |
| `examining` | the doctor: examines a set-up by one optimizer step |
| `adapters` | LoRA configurations of a model, from two words |
"""

from .adapters import lora_config
from .attaching import attach
from .callback import PhiBalanceCallback
from .checkpoints import last_checkpoint
from .examining import doctor


__all__ = ["PhiBalanceCallback", "attach", "doctor", "last_checkpoint", "lora_config"]
