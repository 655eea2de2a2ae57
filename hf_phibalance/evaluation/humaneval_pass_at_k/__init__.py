"""`HumanEvalPassAtK` and `score_humaneval` in their own folder, as `evaluate.load` needs it."""

from .humaneval_pass_at_k import HumanEvalPassAtK, score_humaneval


__all__ = ["HumanEvalPassAtK", "score_humaneval"]
