"""
lm-evaluation-harness for our models and tasks. Loads models with their balancing, and counts expert load.

```python
import lm_eval

lm = PhiBalanceLM("results/x", batch_size=16)
with lm.counting_load():
    results = lm_eval.simple_evaluate(lm, tasks=[load_task("gsm8k")])
    results["expert_load"] = lm.expert_load()
```
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import StoppingCriteria, StoppingCriteriaList

from ..balancing import find_balancer, patch
from ..config import PhiBalanceConfig
from ..files import find_file, quoted
from ..models import base_of, find_adapter, load_any, register_deepseek_moe
from ..tasks import TASKS, make_splits
from . import scoring
from .humaneval_pass_at_k import score_humaneval


TASK_FILES = Path(__file__).with_name("tasks")  # for the harness's `include_path`


def load_task(name: str, dataset_path: str | None = None, **fields: Any) -> dict[str, Any]:
    """
    Reads one of our task files for `lm_eval.simple_evaluate(tasks=[...])`.

    Args:
        name (`str`): `"gsm8k"`, `"humaneval"` or `"made"`.
        dataset_path (`str`, *optional*):
            A dataset on the Hub, a folder with `train.jsonl` and `test.jsonl` (or `.jsonl.gz`) or another one that
            `datasets.load_dataset` reads, or one file with the test problems.
        fields: Fields of the task to replace, for example `repeats`.

    Raises:
        `ValueError`: If a file is empty, or the task needs few-shot examples and `dataset_path` has none.
    """
    task = load_yaml(TASK_FILES / f"{name}.yaml")
    if dataset_path is None:
        return task | fields
    path = Path(dataset_path)
    names = [(split, f"{split}.jsonl{end}") for split in ("train", "test") for end in (".gz", "")]  # the last wins
    files = {split: path / file for split, file in names if (path / file).is_file()}
    if "test" not in files:
        file = next((path / known for known in TASKS[name].files if (path / known).is_file()), path)
        files = {"test": file} if file.is_file() else {}
    task |= {"dataset_path": dataset_path, "dataset_name": None}
    if not files:
        return task | fields  # `datasets` finds its files
    for file in files.values():
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty. Get the file anew.")
    # Each file by its name: in a folder, `datasets` reads test_socratic.jsonl as a part of the split test
    task |= {"dataset_path": "parquet" if files["test"].suffix == ".parquet" else "json"}
    task |= {"dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}}}
    if "train" not in files:
        shots = fields.get("num_fewshot", task["num_fewshot"])
        if shots and path.is_dir():
            raise ValueError(
                f"dataset_path={dataset_path!r} holds no train.jsonl to draw shots from. Add it, or give num_fewshot=0."
            )
        if shots:
            raise ValueError(
                f"dataset_path={dataset_path!r} is one file, which has no training rows to draw shots from. Give the "
                "folder that holds train.jsonl and test.jsonl, or num_fewshot=0."
            )
        task |= {"training_split": None, "fewshot_split": None}
    return task | fields


# ---------------------------------------------------------------------- functions that the task files name


def check_gsm8k(docs: Any) -> Any:
    """
    Returns the test problems as they are.

    Raises:
        `ValueError`: If one has no question, or no answer that it can be scored by.
    """
    for number, doc in enumerate(docs, start=1):
        if (problem := TASKS["gsm8k"].find_problem(doc)) is not None:
            raise ValueError(
                f"Row {number} of the test problems cannot be used for gsm8k: {problem} (answer={quoted(doc.get('answer'))}). "
                "Correct it, or leave it out."
            )
    return docs


def score_gsm8k(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns `strict_match` and `flexible_extract` of an answer to a GSM8K problem, each 0 or 1."""
    found = scoring.score_gsm8k(results[0], doc["answer"])
    return {name: float(found[name]) for name in ("strict_match", "flexible_extract")}


def score_humaneval_samples(
    doc: dict[str, Any], results: Sequence[list[str]], k: Sequence[int] = (1,), **options: Any
) -> dict[str, float]:
    """Runs the samples of a HumanEval problem and returns `pass@k`. The harness has asked for permission."""
    found = score_humaneval(results, [doc], k=k, allow_code_execution=True, **options)
    return {name: value for name, value in found.items() if name.startswith("pass@")}


def made_problems(problems: int = 256, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Returns generated problems as the splits `train` (for few-shot examples) and `test`."""
    from datasets import Dataset

    splits = make_splits(256, 0, problems, seed)
    return {split: Dataset.from_list(splits[split]) for split in ("train", "test")}


# ---------------------------------------------------------------------- models


class _EndRows(StoppingCriteria):
    """
    Ends each row at its own stop text. The harness ends all rows together, at the stop text of the last one.

    `criteria` come from the harness, one for each stop text. Tokens of ended rows do not count as load of `model`.
    """

    def __init__(self, criteria: StoppingCriteriaList, model: Any) -> None:
        self.criteria, self.balancer = criteria, find_balancer(model)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for criterion in self.criteria:
            criterion(input_ids, scores)
        over = [any(found) for found in zip(*(criterion.done_tracker for criterion in self.criteria))]
        over_B = torch.tensor(over, device=input_ids.device)
        if self.balancer is not None and self.balancer.forwards.evaluation is not None:
            self.balancer.forwards.evaluation.end_rows(over_B)
        return over_B


class PhiBalanceLM(HFLM):
    """
    The harness's `HFLM` for our models. It takes the same arguments, and differs in four ways:

    - Models that were saved with φ-balancing are patched again, so that they route with their selection bias.
      `pretrained` may be the folder or the Hub name of a PEFT adapter.
    - The first space of a completion is kept. Llama's tokenizer drops it when it decodes the completion alone.
    - Each row ends at its own stop text, so the load of generated tokens does not depend on the batch size.
    - `accelerate launch` splits the problems among processes without GPUs, too.
    """

    class AUTO_MODEL_CLASS:
        from_pretrained = staticmethod(load_any)

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        register_deepseek_moe()
        own = {"revision": kwargs.get("revision", "main")}
        adapter = find_adapter(pretrained, own)
        base, options = (pretrained, own) if adapter is None else base_of(adapter, pretrained, own)
        self._base, self._base_revision = base, options.get("revision", "main")
        if adapter is not None and not (Path(pretrained) / "tokenizer_config.json").is_file():
            kwargs.setdefault("tokenizer", base)
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **kwargs)
        if (accelerator := getattr(self, "accelerator", None)) is not None:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._anchor = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.generated = 0  # completions

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        super()._get_config(self._base, **(kwargs | {"revision": self._base_revision}))

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Decodes a completion with its first space, which is part of a program's indentation."""
        decode, own = self.tokenizer.decode, [tokens] if isinstance(tokens, int) else list(tokens)
        whole = decode([*self._anchor, *own], skip_special_tokens=skip_special_tokens)
        return whole[len(decode(self._anchor)) :]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        temperature = settings.pop("temperature", 0.0)
        settings |= {"temperature": temperature} if temperature > 0 else {}
        settings.setdefault("do_sample", temperature > 0)
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        self.generated += len(context)
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([_EndRows(stops, self.model)]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **settings,
            )

    @contextmanager
    def counting_load(self) -> Iterator[None]:
        """
        Context manager: counts expert load while the model generates, for [`~PhiBalanceLM.expert_load`]. Each prompt
        token and each new token counts once. Padding and ended rows do not count.
        """
        if find_balancer(self.model) is None:
            with suppress(ValueError):  # a model without routers
                patch(self.model, PhiBalanceConfig(coef=0.0, bias_coef=0.0))
        balancer = find_balancer(self.model)
        with nullcontext() if balancer is None else balancer.evaluation(generation=True):
            yield

    def expert_load(self) -> dict[str, float] | None:
        """
        Returns [`PhiBalancer.eval_metrics`] and the number of completions, over all ranks. Returns `None` if the model
        has no routers, or if all completions came from the harness's cache.
        """
        balancer = find_balancer(self.model)
        if balancer is None or not (load := balancer.eval_metrics(per_layer=0)):
            return None
        return load | {"completions": sum(self.gather_object(self.generated) or ())}  # on the first rank


def model_fingerprint(name_or_path: str, **settings: Any) -> str:
    """
    Returns a hash of a model's settings, and of the names, sizes and times of its files, or of its commit on the Hub. An
    adapter's base model is a part of the model.
    """
    adapter = find_adapter(name_or_path, settings)
    sources = [(name_or_path, settings), *([] if adapter is None else [base_of(adapter, name_or_path, settings)])]
    facts = []
    for source, options in sources:
        config = find_file(source, "config.json", options) or find_file(source, "adapter_config.json", options)
        files = sorted(path for path in Path(source).glob("*") if path.is_file())
        facts.append(f"{source} {config}")  # the path of a file from the Hub has the commit in it
        facts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([*facts, repr(sorted(settings.items()))]).encode()).hexdigest()[:16]
