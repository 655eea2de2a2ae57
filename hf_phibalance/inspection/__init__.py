"""
Shows which experts the tokens of each text domain choose, without training or patching the model.

```python
from hf_phibalance.inspection import html_report, inspect_model, parse_domains

found = inspect_model(model, tokenizer, parse_domains(["math=gsm8k/*.jsonl", "code=src"]))
found.to_dict()  # every figure
html_report(found)
```
"""

from .counting import inspect_model
from .reports import html_report, load_strip, print_inspection
from .results import Inspection, Layer
from .texts import Domain, TextStream, check_texts, padded_batches, padding_of, parse_domains


__all__ = [
    "Domain",
    "Inspection",
    "Layer",
    "TextStream",
    "check_texts",
    "html_report",
    "inspect_model",
    "load_strip",
    "padded_batches",
    "padding_of",
    "parse_domains",
    "print_inspection",
]
