"""
The tasks that the recipes train on and examine: GSM8K, MBPP, HumanEval, and made problems in GSM8K's format.

```python
from hf_phibalance.tasks import load_rows, to_sft_dataset

rows = load_rows("gsm8k", "path/to/gsm8k")  # or "openai/gsm8k": checked line by line, no test problem among them
dataset = to_sft_dataset("gsm8k", rows, tokenizer)  # columns prompt and completion
```

A row is a dictionary as the dataset has it; `TASKS` says how one is put to a model. This room knows texts only: no
model, no router, no score. `datasets` is imported when a dataset is read from the Hub or made.
"""

from .contamination import drop_contaminated
from .loading import load_rows
from .made import make_splits
from .sft import to_sft_dataset
from .table import TASKS


__all__ = ["TASKS", "drop_contaminated", "load_rows", "make_splits", "to_sft_dataset"]
