"""
Watches the routers of a model in training: what they do goes to `moe.jsonl`, and what goes wrong is said with its reason and remedy.

| module | what it holds |
|---|---|
| `watch` | sums over the steps between two logs, and what is done with them at a log |
| `records` | writes and reads `moe.jsonl` |
| `alerts` | finds alerts in the lines of `moe.jsonl`; their thresholds |
| `trackers` | tables, histograms, pictures and alerts in TensorBoard, Weights & Biases and trackio |
"""

from .alerts import Alerts, RouterAlert, Thresholds, text_of
from .records import CONFIDENCE, RECORDS_NAME, Records, append_record, layer_figures, read_records
from .trackers import picture
from .watch import Watch


__all__ = [
    "CONFIDENCE",
    "RECORDS_NAME",
    "Alerts",
    "Records",
    "RouterAlert",
    "Thresholds",
    "Watch",
    "append_record",
    "layer_figures",
    "picture",
    "read_records",
    "text_of",
]
