"""
Publishes a finished run: figures, pictures, a model card, and the upload of all of these with the model. Pictures need
matplotlib: `pip install "hf_phibalance[recipes]"`.

| module | what it holds |
|---|---|
| `run` | what was measured: `metrics.json`, `history.json`, results of lm-evaluation-harness |
| `card`, `model_card.md` | the model card and its template; the results folder |
| `pictures` | expert load and learning curves over training |
| `upload` | the model on the Hub, without private files; the card of a `Trainer` |
"""

from .card import CARD_NAME, as_code, markdown_table, model_card, print_summary, write_report
from .pictures import draw, pictures_in
from .run import SUMMARY_NAME, Run
from .upload import complete_card, push_to_hub


__all__ = [
    "CARD_NAME",
    "SUMMARY_NAME",
    "Run",
    "as_code",
    "complete_card",
    "draw",
    "markdown_table",
    "model_card",
    "pictures_in",
    "print_summary",
    "push_to_hub",
    "write_report",
]
