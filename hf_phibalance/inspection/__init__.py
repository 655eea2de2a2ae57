"""
Shows which experts the tokens of each text domain choose, without training or patching the model.

```python
from hf_phibalance.inspection import Comparison, html_report, inspect_model, parse_domains

domains = parse_domains(["math=gsm8k/*.jsonl", "code=src"])
found = inspect_model(model, tokenizer, domains)
found.to_dict()  # every figure
html_report(found)

before, after = (inspect_model(model, tokenizer, domains, keep_choices=True) for model in (base, tuned))
html_report(Comparison(before, after))

place(found, ranks=8)  # which rank of expert parallelism should hold which experts
```
"""

from .comparing import Comparison
from .counting import inspect_model
from .placing import Placement, place
from .reports import html_report, load_strip, print_comparison, print_inspection, print_placement
from .results import Inspection, Layer
from .texts import Domain, TextStream, check_same_ids, check_texts, padded_batches, padding_of, parse_domains


__all__ = [
    "Comparison",
    "Domain",
    "Inspection",
    "Layer",
    "Placement",
    "TextStream",
    "check_same_ids",
    "check_texts",
    "html_report",
    "inspect_model",
    "load_strip",
    "padded_batches",
    "padding_of",
    "parse_domains",
    "place",
    "print_comparison",
    "print_inspection",
    "print_placement",
]
