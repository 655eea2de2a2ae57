"""`HumanEvalPassAtK` and `score_humaneval`, in a folder of their own as `evaluate.load` wants it."""

from .humaneval_pass_at_k import HumanEvalPassAtK, score_humaneval


__all__ = ["HumanEvalPassAtK", "score_humaneval"]
