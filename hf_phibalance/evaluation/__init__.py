"""
Evaluation: GSM8K and HumanEval as metrics of `evaluate` and as tasks of lm-evaluation-harness, and generated code in a sandbox.

```python
from hf_phibalance.evaluation import GSM8KAccuracy, HumanEvalPassAtK

GSM8KAccuracy().compute(predictions=["... #### 18"], references=["... #### 18"])
HumanEvalPassAtK().compute(predictions=[[completion]], references=[problem], k=[1], allow_code_execution=True)
```

| module | what it holds |
|---|---|
| `gsm8k_accuracy`, `humaneval_pass_at_k` | the metrics, in folders that `evaluate.load` takes |
| `scoring` | the rules of scoring, as plain functions |
| `harness`, `tasks`, `scores` | our models and tasks for lm-evaluation-harness; `recipes/evaluate.py` runs them |
| `sandbox`, `runner` | generated code: outside and inside of the interpreter that runs it |

Metrics need `evaluate`, `harness` needs `lm_eval` and the sandbox needs `pyseccomp`: all come with
`pip install "hf_phibalance[recipes]"`. The sandbox also needs bubblewrap. Importing `hf_phibalance` imports none of this.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .sandbox import CODE_EVAL_VARIABLE, CodeExecutionError, Verdict, require_sandbox, run_program
from .scoring import GSM8K_STOPS, INVALID, extract_flexible, extract_strict, normalise_answer, pass_at_k, truncate


if TYPE_CHECKING:
    from .gsm8k_accuracy import GSM8KAccuracy
    from .humaneval_pass_at_k import HumanEvalPassAtK, score_humaneval


__all__ = [
    "CODE_EVAL_VARIABLE",
    "GSM8K_STOPS",
    "INVALID",
    "CodeExecutionError",
    "GSM8KAccuracy",
    "HumanEvalPassAtK",
    "Verdict",
    "extract_flexible",
    "extract_strict",
    "normalise_answer",
    "pass_at_k",
    "require_sandbox",
    "run_program",
    "score_humaneval",
    "truncate",
]
_METRICS = {
    "GSM8KAccuracy": "gsm8k_accuracy",
    "HumanEvalPassAtK": "humaneval_pass_at_k",
    "score_humaneval": "humaneval_pass_at_k",
}


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
    value = getattr(importlib.import_module(f".{_METRICS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_METRICS})
