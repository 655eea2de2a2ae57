"""
Checkpoints for engines that do not know this package: vLLM, SGLang, llama.cpp, plain transformers.

```python
report = phb.export("results/mine", "results/mine-plain", texts=["math=gsm8k/train.jsonl", "code=src"])
```

| module | what it holds |
|---|---|
| `checkpoint` | the export: measures on texts how much the loss rises without the bias, and refuses if too much |
| `folding` | puts a selection bias into the weights of the routers; compares variants of a model |
| `writing` | the report and the folder |
| `upcycled` | an upcycled checkpoint, tensor by tensor |
| `alone` | a script that loads the folder without this package |
"""

# ruff: noqa: F401

from .checkpoint import export
from .folding import FoldReport, fold
from .upcycled import UpcycleReport, upcycle_checkpoint
from .writing import ExportReport, print_export
