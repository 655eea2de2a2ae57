"""`GSM8KAccuracy` in its own folder, as `evaluate.load` needs it."""

from .gsm8k_accuracy import GSM8KAccuracy


__all__ = ["GSM8KAccuracy"]
