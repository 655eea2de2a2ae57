"""
HumanEval's pass@k as an `evaluate` metric: each completion is run against the checks of its problem, in a sandbox.

Use the class directly, or load it by path, which works offline:

```python
import evaluate
import hf_phibalance.evaluation

metric = hf_phibalance.evaluation.HumanEvalPassAtK()
metric = evaluate.load(f"{hf_phibalance.evaluation.__path__[0]}/humaneval_pass_at_k")
```

`score_humaneval` does the same without `evaluate`'s cache files, for instance for one problem at a time.

`evaluate` copies this file into its cache and reads its imports line by line: keep one import per line.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import evaluate

from hf_phibalance.evaluation import sandbox, scoring


FIELDS = ("prompt", "test", "entry_point")

_DESCRIPTION = """Probability that one of k generated programs passes the checks of its problem, as openai/human-eval
estimates it. Runs generated code: set `HF_ALLOW_CODE_EVAL=1` or pass `allow_code_execution=True` to allow that."""

_INPUTS = """
Args:
    predictions (`list[list[str]]`):
        For each problem its completions, already cut at the stop strings.
    references (`list[dict]`):
        The problems, with the fields `prompt`, `test` and `entry_point` of HumanEval; others are ignored.
    k (`list[int]`, *optional*, defaults to `[1]`):
        Numbers of attempts.
    timeout (`float`, *optional*, defaults to `3.0`):
        Seconds for each program.
    allow_code_execution (`bool`, *optional*):
        Permission to run the completions; by default it is `HF_ALLOW_CODE_EVAL=1` in the environment.
    unsafe (`bool`, *optional*, defaults to `False`):
        Whether to run them without a sandbox, with limits on time and memory only.

Returns:
    `dict`: `pass@k` for each `k` of which every problem has that many completions, averaged over the problems;
    `isolation`, `"bubblewrap"` or `"none"`; and `results`, for each problem a list with one dictionary per completion:
    `passed`, `status` (`"passed"`, `"failed"` or `"timed out"`), `reason` and `seconds`.

Raises:
    `CodeExecutionError`: If running the completions is not allowed, or not possible here.
    `ValueError`: If there are no predictions, not as many as references, or `k` or a limit is not positive.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class HumanEvalPassAtK(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374, 2021",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": {name: datasets.Value("string") for name in FIELDS},
                }
            ),
            reference_urls=["https://github.com/openai/human-eval"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds the completions of some problems for a later `compute()`."""
        references = [_fields(problem) for problem in references]
        super().add_batch(predictions=_check(predictions), references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds the completions of one problem for a later `compute()`."""
        super().add(prediction=_check([prediction])[0], reference=_fields(reference), **kwargs)

    def compute(self, *, predictions=None, references=None, allow_code_execution=None, unsafe=False, **kwargs):
        """Runs the completions, also those added before, if that is allowed and possible."""
        sandbox.require_sandbox(allow_code_execution, unsafe)
        return super().compute(predictions=predictions, references=references, unsafe=unsafe, **kwargs)

    def _compute(self, predictions, references, **kwargs):
        return score_humaneval(predictions, references, allow_code_execution=True, **kwargs)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
def score_humaneval(predictions, references, k=(1,), timeout=3.0, allow_code_execution=None, unsafe=False):
    k = [k] if isinstance(k, int) else list(k)
    if not k or min(k) < 1:
        raise ValueError(f"k={k}: needs at least one number of attempts, each 1 or more.")
    if not len(predictions):
        raise ValueError("predictions: there are none to run. Give the completions of at least one problem.")
    if len(predictions) != len(references):
        raise ValueError(f"predictions: there are {len(predictions)} lists for {len(references)} references.")
    _check(predictions)
    sandbox.require_sandbox(allow_code_execution, unsafe)
    problems = [_fields(problem) for problem in references]

    def run(number, completion):
        problem = problems[number]
        return sandbox.run_program(
            problem["prompt"] + completion,
            f"{problem['test']}\ncheck({problem['entry_point']})",
            context=problem["prompt"],
            entry_points=[problem["entry_point"]],
            timeout=timeout,
            allow_code_execution=True,
            unsafe=unsafe,
        ).to_dict()

    work = [(number, completion) for number, completions in enumerate(predictions) for completion in completions]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results: list = [[] for _ in problems]
    with ThreadPoolExecutor(cores) as pool:
        for (number, _), verdict in zip(work, pool.map(run, *zip(*work))):
            results[number].append(verdict)
    counts = [(len(own), sum(verdict["passed"] for verdict in own)) for own in results]
    scores = {
        f"pass@{attempts}": sum(scoring.pass_at_k(*count, attempts) for count in counts) / len(counts)
        for attempts in k
        if all(samples >= attempts for samples, _ in counts)
    }
    return {**scores, "isolation": "none" if unsafe else "bubblewrap", "results": results}


def _fields(problem: dict) -> dict:
    if missing := [name for name in FIELDS if not isinstance(problem.get(name), str)]:
        raise ValueError(
            f"references: the problem {problem.get('task_id', problem)!r} has no text in {', '.join(missing)}. Give "
            "the problems of HumanEval as they are."
        )
    return {name: problem[name] for name in FIELDS}


def _check(predictions: list) -> list:
    for completions in predictions:
        if isinstance(completions, str):
            raise ValueError(
                f"predictions: {completions[:60]!r} is one text where a list of completions is needed. Give each "
                "problem a list, also if it has only one completion."
            )
    return predictions
