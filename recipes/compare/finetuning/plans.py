"""Plans of fine-tuning: what a YAML file with `bases` asks to be compared, and the runs that follow from it.

```yaml
output: results/compare/finetune
training: {steps: 150, learning_rates: {full: 0.0005, LoRA: 0.002}}   # fields of `run.Training`, for all plans
bases:                                                                # fields of `run.Base`, by name
  mixtral unbalanced: {model: mixtral, method: {method: none}}
plans:
  methods:
    question: Does balancing help?
    baseline: none
    bases: [mixtral unbalanced]
    tasks: [near, functions]
    ways: [full, LoRA]
    seeds: [0, 1, 2]
    methods:
      - {label: none, method: none}
      - {label: "φ price {coef}", coef: [0.003, 0.01]}
```
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..documents import BUILT_IN
from ..plans import Method, expand, read_plans_file
from .exercises import EXERCISES
from .run import Base, Training, Tuning
from .ways import WAYS


@dataclass(kw_only=True)
class Plan(Training):
    """
    One question and the runs that answer it; all fields of `run.Training`, and

    Args:
        name, question, baseline, methods, seeds, data: As those of `compare.plans.Plan`.
        bases (`list[Base]`): What is tuned.
        tasks, ways (`list[str]`): Keys of `exercises.EXERCISES` and `ways.WAYS`.
    """

    name: str
    methods: list[Method]
    bases: list[Base]
    question: str = ""
    baseline: str = ""
    tasks: list[str] = field(default_factory=lambda: list(EXERCISES))
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: str = BUILT_IN
    corpus: str = ""

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        self.baseline = self.baseline or labels[0]
        if len(set(labels)) < len(labels) or self.baseline not in labels:
            raise ValueError(f"plan {self.name!r}: labels must differ, and `baseline` be one; got {labels}.")
        for name, values, known in (("tasks", self.tasks, EXERCISES), ("ways", self.ways, WAYS)):
            for value in values:
                if value not in known:
                    raise ValueError(f"plan {self.name!r}: `{name}` has {value!r}; choose from {', '.join(known)}.")
        for way in self.ways:
            if way not in self.learning_rates:
                raise ValueError(f"plan {self.name!r}: `learning_rates` has none for the way {way!r}.")
        for method in self.methods:
            try:
                self.run(method, self.bases[0], self.tasks[0], self.ways[0], self.seeds[0]).config  # noqa: B018
            except (TypeError, ValueError) as error:
                raise ValueError(f"plan {self.name!r}, method {method.label!r}: {error}") from error

    def run(self, method: Method, base: Base, task: str, way: str, seed: int) -> Tuning:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Training)}
        base = dataclasses.replace(base, material=self.corpus)
        return Tuning(base=base, task=task, way=way, seed=seed, method=method.arguments, corpus=self.corpus, **fields)

    def untouched(self, base: Base, task: str) -> Tuning:
        """The base as it is, on a task: a run of no steps."""
        run = self.run(Method("base", "base", {"method": "none"}), base, task, self.ways[0], 0)
        return dataclasses.replace(run, steps=0, way="full", learning_rates={"full": 0.0}, tokens=0, rank=0)

    def runs(self) -> Iterator[Tuning]:
        """All runs; whole comparisons of one seed come first."""
        for base, task in itertools.product(self.bases, self.tasks):
            yield self.untouched(base, task)
        for seed, base, task, way, method in itertools.product(
            self.seeds, self.bases, self.tasks, self.ways, self.methods
        ):
            yield self.run(method, base, task, way, seed)


def load_plans(path: Path) -> tuple[str, list[Plan]]:
    """
    The results folder and the plans of a YAML file that has `bases`.

    Raises:
        ValueError: if something in it is unknown or does not fit; the message names the plan and the remedy.
    """
    content = read_plans_file(path)
    unknown = sorted(set(content) - {"output", "plans", "bases", "training", "base_training"})
    if unknown:
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}; known are output, training, base_training, bases, plans."
        )
    shared = content.get("base_training") or {}
    try:
        bases = {name: Base(name=name, **{**shared, **given}) for name, given in content["bases"].items()}
    except TypeError as error:
        raise ValueError(f"{path}: a base has a field that is unknown or missing: {error}") from error
    known = {f.name for f in dataclasses.fields(Plan)} - {"name", "corpus"}
    plans = []
    for name, given in content["plans"].items():
        fields = {**(content.get("training") or {}), **given}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"{path}, plan {name!r}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        absent = [base for base in fields.get("bases", bases) if base not in bases]
        if absent:
            raise ValueError(f"{path}, plan {name!r}: there is no base {absent[0]!r}, but {', '.join(bases)}.")
        methods = [method for entry in fields.pop("methods") for method in expand(entry)]
        fields["bases"] = [bases[base] for base in fields.get("bases", bases)]
        plans.append(Plan(name=str(name), methods=methods, **fields))
    return str(content.get("output") or f"results/compare/{path.stem}"), plans
