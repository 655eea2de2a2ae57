"""`GSM8KAccuracy`, in a folder of its own as `evaluate.load` wants it."""

from .gsm8k_accuracy import GSM8KAccuracy


__all__ = ["GSM8KAccuracy"]
