"""
Makes a finished run presentable: figures, pictures, a model card, and the upload of all that with the model. Pictures need
matplotlib, and `print_summary` needs rich: `pip install "hf_phibalance[recipes]"`.

| module | what it holds |
|---|---|
| `run` | what was measured: `metrics.json`, `history.json`, results of lm-evaluation-harness |
| `card`, `model_card.md` | the model card and its template |
| `pictures` | expert load and learning over training |
| `report` | all of these in a results folder, and a table in the terminal |
| `upload` | the model on the Hub, without private files |
| `trainer` | the state and the card in uploads of a `Trainer` |
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
