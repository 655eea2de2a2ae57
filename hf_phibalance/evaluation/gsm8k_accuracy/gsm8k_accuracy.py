"""
GSM8K's exact match as an `evaluate` metric, by the rules of lm-evaluation-harness (task `gsm8k`, version 3.0).

Use the class directly, or load it by path, which works offline:

```python
import evaluate
import hf_phibalance.evaluation

metric = hf_phibalance.evaluation.GSM8KAccuracy()
metric = evaluate.load(f"{hf_phibalance.evaluation.__path__[0]}/gsm8k_accuracy")
```

`evaluate` copies this file into its cache and reads its imports line by line: keep one import per line.
"""

import datasets
import evaluate

from hf_phibalance.evaluation import scoring


_DESCRIPTION = "Share of GSM8K problems whose final number is right, exactly as lm-evaluation-harness counts it."
_INPUTS = """
Args:
    predictions (`list[str]`):
        Generated continuations of `Question: {question}\\nAnswer:`, already cut at the stop strings
        (`truncate(text, GSM8K_STOPS)`): everything in them is read, as in the harness.
    references (`list[str]` or `list[int]`):
        The `answer` fields of the problems, or their final numbers.
    details (`bool`, *optional*, defaults to `False`):
        Whether to return the numbers that were read as well.

Returns:
    `dict`: `strict_match`, the share (0 to 1) whose number after the first `#### ` is right; `flexible_extract`, the
    share whose last number is right; and with `details` also `results`, one dictionary per prediction with `strict`,
    `flexible` (the numbers that were read, normalised), `gold`, `strict_match` and `flexible_extract`.

Raises:
    `ValueError`: If there are no predictions, or not as many as references.
    `TypeError`: If a reference is neither text nor a number.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class GSM8KAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168, 2021",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/openai/grade-school-math"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds predictions and their references for a later `compute()`."""
        references = [scoring.gold_answer(reference) for reference in references]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one prediction and its reference for a later `compute()`."""
        super().add(prediction=prediction, reference=scoring.gold_answer(reference), **kwargs)

    def _compute(self, predictions, references, details=False):
        if not len(predictions):
            raise ValueError("predictions: there are none to score. Give at least one generated answer.")
        results = [scoring.score_gsm8k(*pair) for pair in zip(predictions, references)]
        names = ("strict_match", "flexible_extract")
        scores = {name: sum(result[name] for result in results) / len(results) for name in names}
        return {**scores, "results": results} if details else scores
