"""Plans: what a YAML file asks to be compared, and the runs that follow from it.

```yaml
output: results/compare/main          # results.jsonl, tables, pictures, tokenised text
plans:
  eta:                                # --plans eta
    question: Which η?
    baseline: none                    # label of the method that the others are compared with
    models: [mixtral]
    streams: [mixed, blocked, shift]
    seeds: [0, 1, 2]
    methods:
      - {label: none, method: none}
      - {label: "φ η={ema_rate}", coef: 0.01, ema_rate: [0.1, 0.3, 0.65]}   # a list: one method for each value
```

A method is a label and arguments of `PhiBalanceConfig`; lists are multiplied out. `family` (by default the label as it is
written) says which methods are settings of one, so that a table can show the best of each. What else a plan may set are
the fields of [`Plan`].
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .documents import BUILT_IN
from .models import MODELS
from .run import Run, Training
from .streams import STREAMS


@dataclass(frozen=True)
class Method:
    """A balancing method: its name in tables, the family it is a setting of, arguments of `PhiBalanceConfig`."""

    label: str
    family: str
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class Plan(Training):
    """
    One question and the runs that answer it; all fields of `run.Training`, and

    Args:
        name (`str`): Its key in the file; also the name of its tables and pictures.
        methods (`list[Method]`): What is compared.
        question (`str`, *optional*): Heading of its table.
        baseline (`str`, *optional*): Label of the method that the others are compared with; the first unless said.
        models, streams, seeds (`list`): Keys of `models.MODELS`, of `streams.STREAMS`, numbers.
        data (`str`, *optional*, defaults to `"built-in"`): See `documents.read_documents`; `--data` goes before it.
    """

    name: str
    methods: list[Method]
    question: str = ""
    baseline: str = ""
    models: list[str] = field(default_factory=lambda: ["mixtral"])
    streams: list[str] = field(default_factory=lambda: list(STREAMS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: str = BUILT_IN

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(f"plan {self.name!r}: two methods have the label {doubled[0]!r}; give each its own.")
        self.baseline = self.baseline or labels[0]
        if self.baseline not in labels:
            raise ValueError(f"plan {self.name!r}: `baseline` is {self.baseline!r}, but the labels are {labels}.")
        for name, values, known in (("models", self.models, MODELS), ("streams", self.streams, STREAMS)):
            for value in values:
                if value not in known:
                    raise ValueError(f"plan {self.name!r}: `{name}` has {value!r}; choose from {', '.join(known)}.")
        if min(self.steps, self.window, len(self.seeds)) < 1 or not 1 <= self.micro_batches <= self.rows:
            raise ValueError(
                f"plan {self.name!r}: `steps`, `window` and the number of `seeds` must be at least 1, `micro_batches` from 1 "
                f"to `rows`, got {self.steps}, {self.window}, {len(self.seeds)}, {self.micro_batches} and {self.rows}."
            )
        for method in self.methods:
            try:
                self.run(method, self.models[0], self.streams[0], self.seeds[0]).config  # noqa: B018, it validates
            except (TypeError, ValueError) as error:
                raise ValueError(f"plan {self.name!r}, method {method.label!r}: {error}") from error

    def run(self, method: Method, model: str, stream: str, seed: int) -> Run:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Training)}
        return Run(model=model, stream=stream, seed=seed, method=method.arguments, **fields)

    def runs(self) -> Iterator[Run]:
        """All runs; whole comparisons of one seed come first, so that an interrupted plan can be read."""
        for seed, model, stream, method in itertools.product(self.seeds, self.models, self.streams, self.methods):
            yield self.run(method, model, stream, seed)


def read_plans_file(path: Path) -> dict[str, Any]:
    """
    What a YAML file of plans holds.

    Raises:
        ValueError: if it has no plans.
    """
    import yaml

    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("plans"), dict) or not content["plans"]:
        raise ValueError(f"{path} must hold a mapping with `plans`, a mapping of plans by name.")
    return content


def load_plans(path: Path) -> tuple[str, list[Plan]]:
    """
    The results folder and the plans of a YAML file.

    Raises:
        ValueError: if something in it is unknown or does not fit; the message names the plan and the remedy.
    """
    content = read_plans_file(path)
    unknown = sorted(set(content) - {"output", "plans", "defaults"})
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known are output, defaults, plans.")
    plans = []
    known = {f.name for f in dataclasses.fields(Plan)} - {"name", "corpus"}
    for name, given in content["plans"].items():
        if not re.fullmatch(r"[\w.-]*\w", str(name)):
            raise ValueError(f"{path}: the plan {name!r} cannot name a file; use letters, digits, '.', '-' and '_'.")
        fields = {**(content.get("defaults") or {}), **(given or {})}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"{path}, plan {name!r}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        if not fields.get("methods"):
            raise ValueError(f"{path}, plan {name!r}: `methods` is missing or empty.")
        methods = [method for entry in fields.pop("methods") for method in expand(entry)]
        plans.append(Plan(name=str(name), methods=methods, **fields))
    return str(content.get("output") or f"results/compare/{Path(path).stem}"), plans


def expand(entry: dict[str, Any]) -> Iterator[Method]:
    """The methods that one entry stands for: lists are multiplied out, `{field}` in the label is filled in."""
    arguments = dict(entry)
    if "label" not in arguments:
        raise ValueError(f"a method has no `label`: {entry}")
    template = str(arguments.pop("label"))
    family = str(arguments.pop("family", template))
    varied = [name for name, value in arguments.items() if isinstance(value, list)]
    shown = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    template += "".join(f" {name}={{{name}}}" for name in varied if name not in shown)
    for values in itertools.product(*(arguments[name] for name in varied)):
        chosen = {**arguments, **dict(zip(varied, values))}
        yield Method(template.format(**chosen), family, chosen)
