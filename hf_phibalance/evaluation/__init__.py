"""
Evaluation: GSM8K and HumanEval, as metrics of `evaluate` and tasks of lm-evaluation-harness. Runs code in a sandbox.

```python
from hf_phibalance.evaluation import GSM8KAccuracy, HumanEvalPassAtK

GSM8KAccuracy().compute(predictions=["... #### 18"], references=["... #### 18"])
HumanEvalPassAtK().compute(predictions=[[completion]], references=[problem], k=[1], allow_code_execution=True)
```

Each metric is a folder for `evaluate.load`. `scoring` has the rules of the metrics, `harness` our models and tasks for
lm-evaluation-harness. `sandbox` starts generated code, and `runner` is the program inside the sandbox.

Metrics need `evaluate`, `harness` needs `lm_eval` and the sandbox needs `pyseccomp`: all come with
`pip install "hf_phibalance[recipes]"`. The sandbox also needs bubblewrap. `import hf_phibalance` loads none of these.
"""

from typing import TYPE_CHECKING, Any

from .sandbox import CodeExecutionError, require_sandbox, run_program
from .scoring import GSM8K_STOPS, INVALID, extract_flexible, extract_strict, pass_at_k, score_gsm8k, truncate


if TYPE_CHECKING:
    from .gsm8k_accuracy import GSM8KAccuracy
    from .humaneval_pass_at_k import HumanEvalPassAtK, score_humaneval


__all__ = [
    "GSM8K_STOPS",
    "INVALID",
    "CodeExecutionError",
    "GSM8KAccuracy",
    "HumanEvalPassAtK",
    "extract_flexible",
    "extract_strict",
    "pass_at_k",
    "require_sandbox",
    "run_program",
    "score_gsm8k",
    "score_humaneval",
    "truncate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import evaluate  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"hf_phibalance.evaluation.{name} is a metric of the library `evaluate`, which cannot be imported "
            f'({error}). Install it with: pip install "hf_phibalance[recipes]"'
        ) from error
    from .gsm8k_accuracy import GSM8KAccuracy
    from .humaneval_pass_at_k import HumanEvalPassAtK, score_humaneval

    globals().update(GSM8KAccuracy=GSM8KAccuracy, HumanEvalPassAtK=HumanEvalPassAtK, score_humaneval=score_humaneval)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
