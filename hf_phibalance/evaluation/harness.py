"""
lm-evaluation-harness with our models: they are loaded with their balance, and the experts' load is counted meanwhile.

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
from collections.abc import Iterator
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
from ..models import find_adapter, load_any, register_deepseek_moe
from ..tasks import TASKS


TASK_FILES = Path(__file__).with_name("tasks")  # for the harness's `include_path`


def load_task(name: str, dataset_path: str | None = None, **fields: Any) -> dict[str, Any]:
    """
    Reads one of our task files, for `lm_eval.simple_evaluate(tasks=[...])`.

    Args:
        name (`str`): `"gsm8k"`, `"humaneval"` or `"made"`.
        dataset_path (`str`, *optional*):
            A dataset on the Hub, a folder that `datasets.load_dataset` reads, or one file with the test problems.
        fields: fields of the task to replace, such as `repeats`.

    Raises:
        `ValueError`: If shots are to be drawn from a single file of test problems.
    """
    task = load_yaml(TASK_FILES / f"{name}.yaml")
    if dataset_path is None:
        return task | fields
    path = Path(dataset_path)
    file = next((path / known for known in TASKS[name].files if (path / known).is_file()), path)
    if not file.is_file():
        return task | {"dataset_path": dataset_path, "dataset_name": None} | fields
    if fields.get("num_fewshot", task["num_fewshot"]):
        raise ValueError(
            f"dataset_path={dataset_path!r} is one file, which has no training rows to draw shots from. Give the folder "
            "that holds train.jsonl and test.jsonl, or num_fewshot=0."
        )
    kind = "parquet" if file.suffix == ".parquet" else "json"
    task |= {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    task |= {"training_split": None, "fewshot_split": None}
    return task | fields


class _EndRows(StoppingCriteria):
    """
    Ends each row at its own stop text. The harness's criteria end all rows together, at the stop text of the last.

    Args:
        criteria (`StoppingCriteriaList`): The harness's, one for each stop text.
        model (`PreTrainedModel`): The model that generates. Tokens of a row that has ended do not count as its load.
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

    - Models that were saved with φ-balancing are patched again, so that a selection bias routes as in training.
      `pretrained` may be the folder or the Hub name of a PEFT adapter.
    - The first space of a completion is kept. Tokenizers of the Llama kind drop it when they decode the completion alone.
    - Each row ends at its own stop text, so the load of what is generated does not depend on the batch size.
    - `accelerate launch` divides the problems among processes without GPUs, too.
    """

    class AUTO_MODEL_CLASS:
        from_pretrained = staticmethod(load_any)

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        register_deepseek_moe()
        self._base = base = _base(pretrained, kwargs.get("revision", "main"))
        if base != pretrained and not (Path(pretrained) / "tokenizer_config.json").is_file():
            kwargs.setdefault("tokenizer", base)
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **kwargs)
        if (accelerator := getattr(self, "accelerator", None)) is not None:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._anchor = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.generated = 0  # completions

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        kwargs["revision"] = kwargs["revision"] if self._base == pretrained else "main"
        super()._get_config(self._base, **kwargs)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Decodes a completion with its first space, which is part of the first line of a program."""
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
        Context manager: counts the load of the experts while the model generates, for [`~PhiBalanceLM.expert_load`].
        Tokens of prompts and new tokens count once, padding and rows that have ended never.
        """
        if find_balancer(self.model) is None:
            with suppress(ValueError):  # a model without routers
                patch(self.model, PhiBalanceConfig(coef=0.0, bias_coef=0.0))
        balancer = find_balancer(self.model)
        with nullcontext() if balancer is None else balancer.evaluation(generation=True):
            yield

    def expert_load(self) -> dict[str, float] | None:
        """
        Returns [`PhiBalancer.eval_metrics`] so far and the number of completions, over all ranks. `None` if nothing was
        counted: the model has no routers, or all completions came from the harness's cache.
        """
        balancer = find_balancer(self.model)
        if balancer is None or not (load := balancer.eval_metrics(per_layer=0)):
            return None
        return load | {"completions": sum(self.gather_object(self.generated) or ())}  # on the first rank


def _base(pretrained: str, revision: str) -> str:
    """The model that an adapter is for, or `pretrained` itself."""
    adapter = find_adapter(pretrained, {"revision": revision})
    return pretrained if adapter is None else adapter["base_model_name_or_path"]


def model_fingerprint(name_or_path: str, **settings: Any) -> str:
    """Returns a hash of the settings that a model is loaded with, and of the names, sizes and times of its files."""
    files = sorted(path for path in Path(name_or_path).glob("*") if path.is_file())
    facts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([name_or_path, *facts, repr(sorted(settings.items()))]).encode()).hexdigest()[:16]
