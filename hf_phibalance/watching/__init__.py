"""
Watches the routers of a model in training: what they do goes to `moe.jsonl`, and what goes wrong is said with its reason and remedy.

| module | what it holds |
|---|---|
| `records` | writes and reads `moe.jsonl` |
"""

from .records import CONFIDENCE, RECORDS_NAME, Records, append_record, layer_figures, read_records


__all__ = ["CONFIDENCE", "RECORDS_NAME", "Records", "append_record", "layer_figures", "read_records"]
