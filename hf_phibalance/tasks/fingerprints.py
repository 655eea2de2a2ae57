"""
Makes `fingerprints.json`, the test problems that the contamination guard knows.

```
python -m hf_phibalance.tasks.fingerprints gsm8k=path/to/gsm8k humaneval=path/to/HumanEval.jsonl.gz
```
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from .contamination import FINGERPRINTS, Fingerprints
from .loading import load_rows
from .table import get_task


def write_fingerprints(sources: Mapping[str, str], path: str | Path = FINGERPRINTS) -> Fingerprints:
    """
    Makes the file of fingerprints.

    Args:
        sources (`dict[str, str]`): where the test split of each benchmark is, such as `{"gsm8k": "path/to/gsm8k"}`.
        path (`str` or `Path`, *optional*): where to write; the file in the package.

    Returns:
        [`Fingerprints`]: what was written.
    """
    fingerprints = Fingerprints()
    made_from = {}
    for name, source in sources.items():
        task = get_task(name)
        rows = load_rows(name, source, "test")
        made_from[name] = {"dataset": task.hub_name, "split": "test", "problems": len(rows)}
        for row in rows:
            for text in task.texts(row):
                fingerprints.add(name, text)
    Path(path).write_text(fingerprints.to_json(made_from))
    return fingerprints


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all("=" in argument for argument in sys.argv[1:]):
        raise SystemExit("usage: python -m hf_phibalance.tasks.fingerprints gsm8k=PATH humaneval=PATH")
    written = write_fingerprints(dict(argument.split("=", 1) for argument in sys.argv[1:]))
    for benchmark, entries in written.entries.items():
        print(f"{benchmark}: {len(entries)} texts")
    print(f"written to {FINGERPRINTS}")
