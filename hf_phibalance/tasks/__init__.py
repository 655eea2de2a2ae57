"""
The tasks that the recipes train on and score: GSM8K, MBPP, HumanEval, and generated problems in GSM8K's format.

```python
from hf_phibalance.tasks import load_rows, to_sft_dataset

rows = load_rows("gsm8k", "path/to/gsm8k")  # or "openai/gsm8k"; checked line by line, without test problems
dataset = to_sft_dataset("gsm8k", rows, tokenizer)  # columns prompt and completion
```

A row is a dictionary of the dataset. `TASKS` turns it into prompt and completion. This package handles only text: no
model, no router, no score. `datasets` is imported when a dataset is read from the Hub or made.
"""

from .loading import load_rows, to_sft_dataset
from .made import make_splits
from .table import TASKS


__all__ = ["TASKS", "load_rows", "make_splits", "to_sft_dataset"]
