"""
The command `phibalance`.

```bash
phibalance inspect Qwen/Qwen1.5-MoE-A2.7B --texts math=gsm8k/test.jsonl code=src/ prose=wiki/*.txt --html report.html --json report.json
phibalance place Qwen/Qwen1.5-MoE-A2.7B --texts math=gsm8k/test.jsonl --ranks 6 --map experts.json
phibalance doctor Qwen/Qwen1.5-MoE-A2.7B --coef 0.01 --lora router=lora
phibalance export results/mine results/mine-plain --texts math=gsm8k/train.jsonl
phibalance watch results/mine
phibalance upcycle Qwen/Qwen3-0.6B results/qwen3-moe --experts 8 --top_k 2
```
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..files import printable, replace_unprintable
from .parser import make_parser


__all__ = ["main", "make_parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs `phibalance` with `arguments`, or with those of the process.

    Returns:
        `int`: the exit status: 0, 1 after an error (2 with `doctor`), 130 after Ctrl-C. `doctor` also returns 1 after a warning with
        `--strict`, and 2 after a problem.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    replace_unprintable()
    args = make_parser().parse_args(words)
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # datasets logs the errors it raises
    try:
        from . import commands  # torch and transformers, which --help does without

        return getattr(commands, f"run_{args.command}")(args, ["phibalance", *words])
    except (ValueError, OSError, ImportError) as error:
        lines = map(printable, str(error).splitlines())
        print(f"phibalance {args.command}:", "\n".join(lines), file=sys.stderr)
        return 2 if args.command == "doctor" else 1
    except KeyboardInterrupt:
        print(f"phibalance {args.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
