"""
Checkpoints for engines that know nothing of this package: vLLM, SGLang, llama.cpp, plain transformers.

```python
report = phb.export("results/mine", "results/mine-plain", texts=["math=gsm8k/train.jsonl", "code=src"])
```

| module | what it holds |
|---|---|
| `checkpoint` | what a selection bias becomes: measured on texts, refused if it costs too much |
| `texts` | the texts, in a part to fit on and a part to measure on |
| `report` | the figures, as table, JSON and a section of the model card |
| `writing` | the folder |
| `alone` | loading it as anybody would, in a process of its own |
"""

from .checkpoint import export
from .folding import FoldReport, fold
from .report import ExportReport, print_export


__all__ = ["ExportReport", "FoldReport", "export", "fold", "print_export"]
