"""
What becomes of a run for readers: figures, pictures, a model card, and the upload of all that with the model. Knows
balanced models and finished trainers, not how they are trained. Pictures need matplotlib and the printed table rich
(`pip install "hf_phibalance[recipes]"`); they are imported where they are used.

| module | what it holds |
|---|---|
| `run` | what a run left behind: figures, log, loads, evaluations |
| `tables`, `pictures` | the run beside a baseline |
| `evaluations`, `card` | the words of a model card |
| `report` | all of these in a results folder |
| `folder`, `licence`, `upload` | the model on the Hub |
| `trainer` | what the uploads of a `Trainer` lack |
"""

from .card import model_card
from .pictures import draw, pictures_in
from .report import print_summary, write_report
from .run import SUMMARY_NAME, Run
from .trainer import complete_uploads
from .upload import push_to_hub


__all__ = [
    "SUMMARY_NAME",
    "Run",
    "complete_uploads",
    "draw",
    "model_card",
    "pictures_in",
    "print_summary",
    "push_to_hub",
    "write_report",
]
