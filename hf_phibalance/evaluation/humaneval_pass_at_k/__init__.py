"""`HumanEvalPassAtK`, in a folder of its own as `evaluate.load` wants it."""

from .humaneval_pass_at_k import HumanEvalPassAtK


__all__ = ["HumanEvalPassAtK"]
