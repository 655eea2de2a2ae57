# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
"""
Scores of generated text: GSM8K's exact match and HumanEval's pass@k, as `evaluate` metrics.

```python
from hf_phibalance.evaluation import GSM8KAccuracy, HumanEvalPassAtK

GSM8KAccuracy().compute(predictions=["... #### 18"], references=["... #### 18"])
HumanEvalPassAtK().compute(predictions=[[completion]], references=[problem], k=[1], allow_code_execution=True)
```

The rules of scoring are plain functions in `scoring`, generated code is run by `sandbox`; neither needs `evaluate`,
which is imported when a metric is first used. Importing `hf_phibalance` imports none of this.
"""

from typing import TYPE_CHECKING, Any

from .sandbox import CODE_EVAL_VARIABLE, CodeExecutionError, Verdict, require_opt_in, run_program
from .scoring import (
    GSM8K_STOPS,
    HUMANEVAL_STOPS,
    INVALID,
    extract_flexible,
    extract_strict,
    normalise_answer,
    pass_at_k,
    truncate,
)


if TYPE_CHECKING:
    from .gsm8k_accuracy import GSM8KAccuracy
    from .humaneval_pass_at_k import HumanEvalPassAtK


__all__ = [
    "CODE_EVAL_VARIABLE",
    "GSM8K_STOPS",
    "HUMANEVAL_STOPS",
    "INVALID",
    "CodeExecutionError",
    "GSM8KAccuracy",
    "HumanEvalPassAtK",
    "Verdict",
    "extract_flexible",
    "extract_strict",
    "normalise_answer",
    "pass_at_k",
    "require_opt_in",
    "run_program",
    "truncate",
]

_METRICS = ("GSM8KAccuracy", "HumanEvalPassAtK")


def __getattr__(name: str) -> Any:
    if name not in _METRICS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import evaluate  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"hf_phibalance.evaluation.{name} is a metric of the library `evaluate`, which cannot be imported "
            f'({error}). Install it with: pip install "hf_phibalance[recipes]"'
        ) from error
    from .gsm8k_accuracy import GSM8KAccuracy
    from .humaneval_pass_at_k import HumanEvalPassAtK

    globals().update(GSM8KAccuracy=GSM8KAccuracy, HumanEvalPassAtK=HumanEvalPassAtK)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_METRICS})
