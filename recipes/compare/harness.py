"""
Turns a YAML file of plans into runs. Each run is one process and writes one line of a results file.

```yaml
kind: scratch                         # module of this package that trains; "scratch" by default
output: results/compare/main          # folder of results.jsonl, tables, pictures and tokenised text
defaults: {steps: 500}                # fields of every plan
plans:
  eta:                                # --plans eta
    question: Which η?
    baseline: none                    # label of the method that others are compared with; by default the first
    models: [mixtral]                 # an axis of the kind; by default all of its values
    seeds: [0, 1, 2]
    methods:
      - {label: none, method: none}
      - {label: "φ η={ema_rate}", coef: 0.01, ema_rate: [0.1, 0.3, 0.65]}   # a list: one method for each value
```

A plan is the product of its methods, the values of its axes and its seeds. A method is a label and arguments of
`PhiBalanceConfig`. Methods of one entry are one `family`, which pictures join by a line. All other fields of a plan are those
of the kind's `Run`.

A kind is a module in `KINDS`. It has `Run`, a subclass of [`Run`]; `axes(content)`, which returns the values of each
axis by name; and `KEYS`, the additional keys of its YAML files.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import re
import string
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, ClassVar

import hf_phibalance as phb


KINDS = ("scratch", "finetune", "real")


# ---------------------------------------------------------------------- runs

# Fields of PhiBalanceConfig that enter a run's key even if the plan does not set them. Others enter it only if set, so
# that a new field, or a new default that a run does not read, keeps finished runs valid.
READ_BY_ALL = ("method", "coef", "bias_coef", "token_mask")
READ_BY_PHI = ("potential", "potential_kwargs", "ema_rate")
READ_WITH = {"coef": ("track", "price_from"), "bias_coef": ("bias_track",)}  # only where that coefficient is not 0
# Fields added later. At these values they do not enter a key.
LATER = {"portable": False, "device": "cpu", "precision": "fp32", "capacity": 0.0, "capacities": []}


@dataclass(kw_only=True)
class Run:
    """All settings that the result of a run depends on."""

    own_arguments: ClassVar[tuple[str, ...]] = ()  # arguments of methods beyond those of PhiBalanceConfig

    seed: int = 0  # of the weights and of the order of the data
    method: dict[str, Any] = field(default_factory=dict)  # arguments of PhiBalanceConfig
    steps: int = 500
    portable: bool = False  # whether to measure models with a selection bias without it, too
    corpus: str = ""  # fingerprint of the text

    @property
    def config_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.method.items() if name not in self.own_arguments}

    @property
    def config(self) -> phb.PhiBalanceConfig:
        return phb.PhiBalanceConfig(**self.config_arguments)

    @property
    def settings(self) -> dict[str, Any]:
        """All fields as JSON values, with the defaults of `PhiBalanceConfig` that the method reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        method = method_settings(self.config_arguments)
        method |= {name: self.method[name] for name in self.own_arguments if self.method.get(name)}
        return fields | {"method": method, "portable": self.is_served_plainly}

    @property
    def is_served_plainly(self) -> bool:
        return self.portable and self.config.bias_coef > 0

    @property
    def key(self) -> str:
        return key_of(self.settings)

    @property
    def reference(self) -> Run | None:
        """The run to compare with in [`figures`], if any."""
        return None

    def figures(self, results: Results) -> dict[str, float] | None:
        """Returns the figures for the tables: `None` if the run is not finished, `{}` if it diverged."""
        record = results.get(self)
        if record is None:
            return None
        return {} if "diverged_at" in record["metrics"] else record["metrics"]

    @classmethod
    def prepare(cls, data: str, settings: Mapping[str, Any], output: Path) -> str:
        """Prepares the text in `output` and returns its fingerprint."""
        raise NotImplementedError

    def needs(self, output: Path) -> list[Any]:
        """Returns what must be trained first and does not exist yet: objects with `key` and `train`."""
        return []

    def train(self, output: Path) -> dict[str, Any] | None:
        """Trains. Returns `metrics` and the other entries of the result's line."""
        raise NotImplementedError


def method_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns `arguments` of `PhiBalanceConfig` with those of its defaults that a result depends on."""
    resolved = phb.PhiBalanceConfig(**arguments).to_dict()
    read = {*READ_BY_ALL, *arguments}
    if resolved["method"] == "phi":
        read |= {*READ_BY_PHI, *(name for lever, names in READ_WITH.items() if resolved[lever] for name in names)}
    return {name: resolved[name] for name in sorted(read)}


def key_of(settings: dict[str, Any]) -> str:
    """Returns a digest of [`Run.settings`] without the text."""
    told = {n: value for n, value in settings.items() if n != "corpus" and (n not in LATER or value != LATER[n])}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Method:
    label: str
    family: str
    arguments: dict[str, Any]


def expand(entry: dict[str, Any]) -> Iterator[Method]:
    """Yields the methods of one entry: the product of its lists. Fills in `{field}` in the label."""
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


@dataclass(kw_only=True)
class Plan:
    """A question and the runs that answer it."""

    name: str  # also of its tables and pictures
    kind: str
    axes: dict[str, dict[str, Any]]  # chosen values by name: {"models": {"mixtral": "mixtral"}, ...}
    methods: list[Method]
    settings: dict[str, Any] = field(default_factory=dict)  # other fields of the kind's `Run`
    question: str = ""
    baseline: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: str = "built-in"  # `--data` overrides it

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(f"plan {self.name!r}: two methods have the label {doubled[0]!r}; give each its own.")
        self.baseline = self.baseline or labels[0]
        if self.baseline not in labels:
            raise ValueError(f"plan {self.name!r}: `baseline` is {self.baseline!r}, but the labels are {labels}.")
        if not self.seeds:
            raise ValueError(f"plan {self.name!r}: `seeds` is empty; give at least one.")
        for method in self.methods:
            try:
                self.run(method, self.cells[0], self.seeds[0]).config  # noqa: B018, it validates
            except (TypeError, ValueError) as error:
                raise ValueError(f"plan {self.name!r}, method {method.label!r}: {error}") from error

    @property
    def run_class(self) -> type[Run]:
        return kind_module(self.kind).Run

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """Returns all combinations of names, one from each axis."""
        return list(itertools.product(*self.axes.values()))

    def run(self, method: Method, cell: Sequence[str], seed: int) -> Run:
        at = {axis[:-1]: values[name] for (axis, values), name in zip(self.axes.items(), cell)}  # "models": `model`
        return self.run_class(seed=seed, method=method.arguments, **at, **self.settings)

    def runs(self) -> Iterator[Run]:
        """Yields the runs of all methods, seed by seed, so that an interrupted plan has complete comparisons."""
        for seed, cell, method in itertools.product(self.seeds, self.cells, self.methods):
            yield self.run(method, cell, seed)

    def all_runs(self) -> list[Run]:
        """Returns the reference runs, then those of the methods."""
        runs = list(self.runs())
        return [run.reference for run in runs if run.reference is not None] + runs


def kind_module(kind: str) -> Any:
    return importlib.import_module(f"{__package__}.{kind}")


def load_plans(path: Path) -> tuple[Path, list[Plan]]:
    """Returns the output folder and the plans of a YAML file. Raises `ValueError` for an invalid plan."""
    import yaml

    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("plans"), dict) or not content["plans"]:
        raise ValueError(f"{path} must hold a mapping with `plans`, a mapping of plans by name.")
    kind = content.get("kind", "scratch")
    if kind not in KINDS:
        raise ValueError(f"{path}: `kind` is {kind!r}; choose from {', '.join(KINDS)}.")
    module = kind_module(kind)
    keys = {"kind", "output", "defaults", "plans", *module.KEYS}
    if unknown := sorted(set(content) - keys):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(keys))}.")
    try:
        axes = module.axes(content)
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing; `kind: {kind}` needs it.") from error
    of_plan = {"question", "baseline", "seeds", "data"}
    of_run = {f.name for f in dataclasses.fields(module.Run)} - {"seed", "method", "corpus", *(a[:-1] for a in axes)}
    plans = []
    for name, given in content["plans"].items():
        if not re.fullmatch(r"[\w.-]*\w", str(name)):
            raise ValueError(f"{path}: the plan {name!r} cannot name a file; use letters, digits, '.', '-' and '_'.")
        fields = {**(content.get("defaults") or {}), **(given or {})}
        known = of_plan | of_run | set(axes) | {"methods"}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"{path}, plan {name!r}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        if not fields.get("methods"):
            raise ValueError(f"{path}, plan {name!r}: `methods` is missing or empty.")
        chosen = {}
        for axis, values in axes.items():
            names = fields.get(axis, list(values))
            if absent := [value for value in names if value not in values]:
                raise ValueError(
                    f"{path}, plan {name!r}: `{axis}` has {absent[0]!r}; choose from {', '.join(values)}."
                )
            chosen[axis] = {value: values[value] for value in names}
        plans.append(
            Plan(
                name=str(name),
                kind=kind,
                axes=chosen,
                methods=[method for entry in fields["methods"] for method in expand(entry)],
                settings={key: value for key, value in fields.items() if key in of_run},
                **{key: value for key, value in fields.items() if key in of_plan},
            )
        )
    return Path(content.get("output") or f"results/compare/{Path(path).stem}"), plans


# ---------------------------------------------------------------------- results


class Results:
    """
    Finished runs by their settings, from a file of one JSON line each. Damaged lines are skipped with a warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._records: dict[str, dict[str, dict[str, Any]]] = {}  # by key, then by text
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                warnings.warn(f"{self.path}, line {number} is no result; its run is done again.", stacklevel=2)

    def __contains__(self, run: Run) -> bool:
        return run.corpus in self._records.get(run.key, {})

    def __len__(self) -> int:
        return sum(map(len, self._records.values()))

    def get(self, run: Run) -> dict[str, Any] | None:
        """Returns the result of `run` on its text, or on the text of the latest result if `run.corpus` is empty."""
        by_corpus = self._records.get(run.key, {})
        return by_corpus.get(run.corpus) if run.corpus else next(reversed(by_corpus.values()), None)

    def add(self, record: Mapping[str, Any]) -> None:
        append(self.path, record)
        self._keep(record)

    def _keep(self, record: Mapping[str, Any]) -> None:
        corpus = record["settings"]["corpus"]
        if not isinstance(corpus, str) or not all(type(value) in (int, float) for value in record["metrics"].values()):
            raise TypeError("a result has the name of its text, and figures")
        by_corpus = self._records.setdefault(key_of(record["settings"]), {})
        by_corpus.pop(corpus, None)  # the latest comes last
        by_corpus[corpus] = dict(record)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a result on a line of its own, even after an incomplete line. Other processes may append, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dict(record), sort_keys=True).encode() + b"\n"
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        is_cut = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * is_cut + line)
        file.flush()
        os.fsync(file.fileno())


Cells = dict[tuple[str, ...], dict[str, dict[int, dict[str, float]]]]


def finished(plan: Plan, results: Results) -> Cells:
    """Returns the figures of the finished runs by cell, label and seed; `{}` for a run that diverged."""
    found: Cells = {}
    for cell in plan.cells:
        rows: dict[str, dict[int, dict[str, float]]] = {method.label: {} for method in plan.methods}
        for method, seed in itertools.product(plan.methods, plan.seeds):
            figures = plan.run(method, cell, seed).figures(results)
            if figures is not None:
                rows[method.label][seed] = figures
        if any(rows.values()):
            found[cell] = rows
    return found


# ---------------------------------------------------------------------- processes

ATTEMPTS = 3  # tries of a run whose process is killed
# Keeps freed memory in glibc: to return it and fault it in again takes up to a third of such small steps.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}


def execute(
    jobs: Sequence[Any], output: Path, workers: int, threads: int = 1, say: Callable[[str], None] = print
) -> int:
    """
    Trains `jobs`, each in a process of `threads` torch threads, `workers` at a time. Returns how many failed.

    Each process appends its result to `output/results.jsonl` itself. A killed process is started again.
    """
    os.environ.update(KEEP_MEMORY | {"OMP_NUM_THREADS": f"{threads}"})
    context = get_context("forkserver")  # imports once for all processes, and forks before any thread has started
    context.set_forkserver_preload(["hf_phibalance", "transformers", "peft"])
    waiting, running, attempts, failed = list(jobs), {}, Counter(), 0
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            process = context.Process(target=work, args=(job, output, threads), daemon=True)
            process.start()
            running[process.sentinel] = process, job
        for sentinel in connection.wait(list(running)):
            process, job = running.pop(sentinel)
            process.join()
            attempts[job.key] += 1
            if process.exitcode == 0:
                continue
            if process.exitcode > 0 or attempts[job.key] == ATTEMPTS:
                failed += 1
                say(f"{job}: failed, {'its error is above' if process.exitcode > 0 else f'killed {ATTEMPTS} times'}")
            else:
                waiting.append(job)
                say(f"{job}: killed by signal {-process.exitcode} (out of memory?); it is tried again")
    return failed


def work(job: Any, output: Path, threads: int) -> None:
    """Trains one job, in its process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    record = job.train(output)
    if record is None:
        print(f"{job}: trained", flush=True)
        return
    append(output / "results.jsonl", {"key": job.key, "settings": job.settings, **record})
    shown = ("loss", "max_vio_global", "run_seconds", "diverged_at")
    figures = [f"{name} {record['metrics'][name]:.4g}" for name in shown if name in record["metrics"]]
    print(f"{job}: {', '.join(figures)}", flush=True)


def end_with_parent() -> None:
    """Ends this process when the command is killed."""
    connection.wait([parent_process().sentinel])
    os._exit(1)
