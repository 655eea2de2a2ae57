"""
Looking into the routers of a MoE model: where the tokens of some domains of text go, without training or patching.

```python
from hf_phibalance.inspection import html_report, inspect_model, parse_domains

found = inspect_model(model, tokenizer, parse_domains(["math=gsm8k/*.jsonl", "code=src"]))
found.to_dict()  # every figure
html_report(found)
```

| module | what it holds |
|---|---|
| `rows` | rows of files, and their text |
| `texts` | texts of named domains as token sequences |
| `batches` | and those as batches |
| `survey` | the model run over them |
| `census` | what its routers choose meanwhile, counted |
| `findings`, `figures` | what was counted, and what follows from it |
| `tables` | the figures in the terminal |
| `pictures`, `page` | and as an HTML page |
| `wording` | what these two say alike |

Knows routers, and a patch only as far as its selection bias is in force.
"""

from .batches import padded_batches, padding_of
from .findings import Inspection
from .page import html_report
from .survey import inspect_model
from .tables import print_inspection
from .texts import Domain, TextStream, check_texts, parse_domains


__all__ = [
    "Domain",
    "Inspection",
    "TextStream",
    "check_texts",
    "html_report",
    "inspect_model",
    "padded_batches",
    "padding_of",
    "parse_domains",
    "print_inspection",
]
