"""
Evaluation: what a model writes on GSM8K and HumanEval, its scores as `evaluate` metrics, its expert load meanwhile.

```python
from hf_phibalance.evaluation import GSM8KAccuracy, HumanEvalPassAtK

GSM8KAccuracy().compute(predictions=["... #### 18"], references=["... #### 18"])
HumanEvalPassAtK().compute(predictions=[[completion]], references=[problem], k=[1], allow_code_execution=True)
```

| module | what it holds |
|---|---|
| `problems` | the problems, the prompts that put them, the scores of what a model wrote |
| `generation` | completions by a model |
| `completions` | completions on disk, which an interruption does not lose |
| `loads` | how evenly all this is spread over the experts |
| `provenance` | which model, prompts and versions a result comes from |
| `scoring` | the rules of scoring, as plain functions |
| `gsm8k_accuracy`, `humaneval_pass_at_k` | the metrics, in folders that `evaluate.load` takes |
| `sandbox`, `runner` | generated code: outside and inside of the interpreter that runs it |

This room may know tasks, models and balancing, no trainer, and none of those knows it. Rules and sandbox need nothing
but the standard library; the rest is imported when first used, and `evaluate` with the metrics only. Importing
`hf_phibalance` imports none of this.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .sandbox import CODE_EVAL_VARIABLE, CodeExecutionError, Verdict, require_sandbox, run_program
from .scoring import (
    GSM8K_STOPS,
    HARNESS_FEWSHOT_SEED,
    HUMANEVAL_STOPS,
    INVALID,
    extract_flexible,
    extract_strict,
    normalise_answer,
    pass_at_k,
    truncate,
)


if TYPE_CHECKING:
    from .completions import CompletionStore
    from .generation import Decoding, complete, reset_generation_config, tokenize_prompts
    from .gsm8k_accuracy import GSM8KAccuracy
    from .humaneval_pass_at_k import HumanEvalPassAtK, score_humaneval
    from .loads import count_loads, expert_load
    from .problems import as_chats, load_problems, make_prompts, score_completions
    from .provenance import model_fingerprint, text_fingerprint, versions


__all__ = [
    "CODE_EVAL_VARIABLE",
    "GSM8K_STOPS",
    "HARNESS_FEWSHOT_SEED",
    "HUMANEVAL_STOPS",
    "INVALID",
    "CodeExecutionError",
    "CompletionStore",
    "Decoding",
    "GSM8KAccuracy",
    "HumanEvalPassAtK",
    "Verdict",
    "as_chats",
    "complete",
    "count_loads",
    "expert_load",
    "extract_flexible",
    "extract_strict",
    "load_problems",
    "make_prompts",
    "model_fingerprint",
    "normalise_answer",
    "pass_at_k",
    "require_sandbox",
    "reset_generation_config",
    "run_program",
    "score_completions",
    "score_humaneval",
    "text_fingerprint",
    "tokenize_prompts",
    "truncate",
    "versions",
]
# What is imported when first asked for, and where it is.
_METRICS = {
    "GSM8KAccuracy": "gsm8k_accuracy",
    "HumanEvalPassAtK": "humaneval_pass_at_k",
    "score_humaneval": "humaneval_pass_at_k",
}
_MODULES = {
    **_METRICS,
    "CompletionStore": "completions",
    "Decoding": "generation",
    "as_chats": "problems",
    "complete": "generation",
    "count_loads": "loads",
    "expert_load": "loads",
    "load_problems": "problems",
    "make_prompts": "problems",
    "model_fingerprint": "provenance",
    "reset_generation_config": "generation",
    "score_completions": "problems",
    "text_fingerprint": "provenance",
    "tokenize_prompts": "generation",
    "versions": "provenance",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _METRICS:
        try:
            import evaluate  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"hf_phibalance.evaluation.{name} is a metric of the library `evaluate`, which cannot be imported "
                f'({error}). Install it with: pip install "hf_phibalance[recipes]"'
            ) from error
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
