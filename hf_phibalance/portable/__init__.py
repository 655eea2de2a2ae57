"""
Checkpoints for engines that know nothing of this package: vLLM, SGLang, llama.cpp, plain transformers.

```python
report = phb.export("results/mine", "results/mine-plain", texts=["math=gsm8k/train.jsonl", "code=src"])
```

| module | what it holds |
|---|---|
| `exporting` | what a selection bias becomes: measured on texts, refused if it costs too much |
| `texts` | the texts, in a part to fit on and a part to measure on |
| `report` | the figures, as table, JSON and a section of the model card |
| `writing` | the folder |
| `alone` | loading it as anybody would, in a process of its own |
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_door


if TYPE_CHECKING:
    from .exporting import export
    from .report import ExportReport, print_export


__all__ = ["ExportReport", "export", "print_export"]
_MODULES = {"ExportReport": "report", "export": "exporting", "print_export": "report"}
__getattr__, __dir__ = lazy_door(globals(), _MODULES)
