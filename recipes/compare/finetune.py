"""
Fine-tuning: a run tunes a small trained model, the base, on one task. It measures what the model learnt and forgot,
and how its routing changed.

Bases are trained once, on text of several domains and easy exercises, and kept in the output folder. A file of plans
has these fields besides those of [`harness`]:

```yaml
kind: finetune
base_training: {steps: 4000}                                     # fields of every `Base`
bases:
  mixtral unbalanced: {model: mixtral, method: {method: none}}   # fields of `Base`, by name
```
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import hf_phibalance as phb
from hf_phibalance.evaluation import GSM8K_STOPS, score_gsm8k, truncate
from hf_phibalance.evaluation.sandbox import run_program
from hf_phibalance.maths import Potential

from . import harness, text
from .exercises import EXERCISES, MADE, Exercise, Task
from .measures import changed_share, examine_text, mean_max_vio, recorded_choices, rounded, thin
from .models import build_model
from .training import Batch, Diverged, environment, micro_batches, optimize, served_plainly


KEYS = ("base_training", "bases")
VOCABULARY = 1024
WINDOW = 128  # tokens of a row of the bases' text
HELD_OUT_WINDOWS = 64  # of each domain
LONGEST = 256  # tokens of an exercise; longer ones are left out
GRADED = 96  # held-out exercises of a task whose answers are generated and scored
GRADED_AT_ONCE = 48
MOST_NEW_TOKENS = {"answer": 110, "function": 40}
EXERCISES_SHARE = 0.4  # of a base's windows; exercises are learnt easily and get less than their share of the domains
FIRST_STEPS = 50  # figures of each of these steps are kept
IGNORED = -100
ADAPTED = {
    "LoRA": "frozen",
    "LoRA, router by LoRA": "lora",
    "LoRA, router full": "full",
}  # router policy by way
WAYS = ("full", *ADAPTED, "router")  # "router": the routers' weights and nothing else


class Limit(Potential):
    """f'(r) = max(0, r - value): only experts above the limit `value` have a price."""

    def _f(self, r: Tensor) -> Tensor:
        return (r - self.value).clamp(min=0.0).square() / 2

    def _slope(self, r: Tensor) -> Tensor:
        return (r - self.value).clamp(min=0.0)


def axes(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    shared = content.get("base_training") or {}
    try:
        bases = {name: Base(name=name, **{**shared, **given}) for name, given in content["bases"].items()}
    except TypeError as error:
        raise ValueError(f"a base has a field that is unknown or missing: {error}") from error
    return {"bases": bases, "tasks": {name: name for name in EXERCISES}, "ways": {name: name for name in WAYS}}


# ---------------------------------------------------------------------- text and exercises as tokens

Row = tuple[list[int], int]  # ids of prompt, completion and end of text; length of the prompt


@dataclass(frozen=True)
class Encoded:
    """A task as tokens. `graded`: ids of prompts, each with the reference that scores its answer."""

    train: list[Row]
    held_out: list[Row]
    graded: list[tuple[list[int], str]]
    grade: str


@dataclass(frozen=True)
class Material:
    """All data for training and measuring."""

    train: dict[str, Tensor]  # windows `(N, WINDOW)` of the bases' text, by domain
    validation: dict[str, Tensor]
    tasks: dict[str, Encoded]
    tokenizer_json: str
    fingerprint: str  # digest of all texts and of how they were cut

    @functools.cached_property
    def tokenizer(self):
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)


@functools.lru_cache
def build_material(source: str, cache: Path) -> Material:
    """
    Reads the texts, generates exercises and tokenises all, or loads the result of an earlier call from the folder
    `cache`. `source`: a folder with `gsm8k/`, `mbpp/` and `wikitext2/`, or `"built-in"` for tasks that need no data.
    """
    data = None if source == text.BUILT_IN else Path(source)
    tasks = {name: make(data) for name, make in EXERCISES.items() if data is not None or name in MADE}
    documents = text.read_documents(source)
    del documents["problems"]  # GSM8K is among the tasks, half of it for the bases
    splits = {name: text.split_documents(texts) for name, texts in documents.items()}
    splits["exercises"] = text.split_documents([e.prompt + e.completion for task in tasks.values() for e in task.base])
    digest = hashlib.sha256(f"{VOCABULARY} {WINDOW} {LONGEST} {HELD_OUT_WINDOWS} {GRADED}".encode())
    for parts in splits.values():
        for document in itertools.chain(*parts):
            digest.update(text.digest_of(document))
    for task in tasks.values():
        for exercise in (*task.train, *task.held_out):
            digest.update(text.digest_of(exercise.prompt + exercise.completion + exercise.reference))
    fingerprint = digest.hexdigest()[:16]
    path = cache / f"material-{fingerprint}.pt"
    if not path.is_file():
        tokenizer = text.train_tokenizer([train for train, _ in splits.values()], VOCABULARY, digits_alone=True)
        cut = {name: [text.windows(tokenizer, part, WINDOW) for part in parts] for name, parts in splits.items()}
        fields = {
            "train": {name: train for name, (train, _) in cut.items()},
            "validation": {name: text.spread_over(held, HELD_OUT_WINDOWS, name) for name, (_, held) in cut.items()},
            "tasks": {name: vars(encode(tokenizer, task)) for name, task in tasks.items()},
            "tokenizer_json": tokenizer.to_str(),
            "fingerprint": fingerprint,
        }
        text.save_tensors(fields, path)
    return load_material(fingerprint, cache)


def load_material(fingerprint: str, cache: Path) -> Material:
    """Loads the result of [`build_material`] from `cache`."""
    fields = text.load_tensors(cache / f"material-{fingerprint}.pt")
    return Material(**{**fields, "tasks": {name: Encoded(**task) for name, task in fields["tasks"].items()}})


def encode(tokenizer, task: Task) -> Encoded:
    end = tokenizer.token_to_id(text.END_OF_TEXT)

    def ids(string: str) -> list[int]:
        return tokenizer.encode(string, add_special_tokens=False).ids

    def rows(exercises: list[Exercise]) -> list[Row]:
        parts = [(ids(e.prompt), ids(e.completion)) for e in exercises]
        return [([*p, *c, end], len(p)) for p, c in parts if len(p) + len(c) < LONGEST]

    graded = [(ids(e.prompt), e.reference) for e in task.held_out[:GRADED]] if task.grade else []
    graded = [row for row in graded if len(row[0]) < LONGEST]
    return Encoded(rows(task.train), rows(task.held_out), graded, task.grade)


def collate(rows: list[Row]) -> Batch:
    """Returns `input_ids`, `attention_mask` and `labels` (completions only), each `(B, S)`, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for row, (ids, prompt) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch


# ---------------------------------------------------------------------- bases


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model that is trained once."""

    name: str
    model: str  # a key of `models.MODELS`
    method: dict[str, Any]  # arguments of PhiBalanceConfig
    model_fields: dict[str, Any] = field(default_factory=dict)  # config fields that replace those in `MODELS`
    steps: int = 3000
    rows: int = 8  # windows per step
    learning_rate: float = 0.003  # peak
    seed: int = 0
    material: str = ""  # fingerprint of the text

    @property
    def key(self) -> str:
        """Digest of all fields but name and material. The file name of the weights has all three."""
        fields = {**dataclasses.asdict(self), "method": harness.method_settings(self.method)}
        return harness.key_of({name: value for name, value in fields.items() if name not in ("name", "material")})

    def __str__(self) -> str:
        return f"base {self.name}"

    def path(self, output: Path) -> Path:
        return output / "bases" / f"{self.name}-{self.key}-{self.material}.pt"

    def build(self, material: Material) -> nn.Module:
        return build_model(self.model, material.tokenizer.get_vocab_size(), self.seed, **self.model_fields)

    def load(self, material: Material, output: Path) -> nn.Module:
        """Returns the trained base, not patched."""
        model = self.build(material)
        model.load_state_dict(text.load_tensors(self.path(output)))
        return model

    def train(self, output: Path) -> None:
        """Trains the base and writes its weights."""
        material = load_material(self.material, output)
        model = self.build(material)
        phb.patch(model, phb.PhiBalanceConfig(**self.method))
        for _ in optimize(model, self.batches(material), self.steps, self.learning_rate, weight_decay=0.1):
            pass
        phb.unpatch(model)
        text.save_tensors(model.state_dict(), self.path(output))

    def batches(self, material: Material) -> Iterator[list[Batch]]:
        """Yields endless batches of windows `(rows, WINDOW)`, drawn by the domains' shares."""
        rng = random.Random(f"base {self.seed}")
        domains = list(material.train)
        others = (1 - EXERCISES_SHARE) / (len(domains) - 1)
        weights = [EXERCISES_SHARE if name == "exercises" else others for name in domains]
        while True:
            chosen = rng.choices(domains, weights, k=self.rows)
            yield micro_batches(torch.stack([rng.choice(material.train[domain]) for domain in chosen]), 1)


# ---------------------------------------------------------------------- runs


@dataclass(kw_only=True)
class Run(harness.Run):
    """
    A fine-tuning run. `method` may also have `calibrate`, the number of batches that calibrate the means before step
    1, `calibrate_bias`, whether they calibrate the bias too, and `limit`, a relative load: the potential is [`Limit`].
    """

    own_arguments: ClassVar[tuple[str, ...]] = ("calibrate", "calibrate_bias", "limit")

    base: Base
    task: str  # a key of `EXERCISES`
    way: str  # one of `WAYS`
    steps: int = 150
    tokens: int = 1000  # approximate tokens per step, without padding; determines the number of rows
    micro_batches: int = 1
    learning_rates: dict[str, float] = field(default_factory=dict)  # peak, by way
    weight_decay: float = 0.0  # of matrices only
    rank: int = 8  # of adapters

    def __post_init__(self) -> None:
        if self.way not in self.learning_rates:
            raise ValueError(f"`learning_rates` has none for the way {self.way!r}.")
        self.base = dataclasses.replace(self.base, material=self.corpus)

    def __str__(self) -> str:
        if self.steps == 0:
            return f"{self.base.name} {self.task}, as it is"
        method = " ".join(f"{name}={value}" for name, value in self.method.items())
        return f"{self.base.name} {self.task} {self.way} seed {self.seed}  {method}"

    @property
    def settings(self) -> dict[str, Any]:
        """As in [`harness.Run`], but with the base's key and only the learning rate in use."""
        own = {"base": self.base.key, "learning_rates": {self.way: self.learning_rates[self.way]}}
        return super().settings | own

    @property
    def reference(self) -> Run:
        """Returns a run of 0 steps on the same task, which measures the base."""
        nothing = {"steps": 0, "tokens": 0, "rank": 0, "seed": 0, "way": "full", "learning_rates": {"full": 0.0}}
        return dataclasses.replace(self, method={"method": "none"}, **nothing)

    def figures(self, results: harness.Results) -> dict[str, float] | None:
        """Adds `forgotten`, the growth of the loss on the bases' text, and means and maxima over the first steps."""
        figures, before, record = super().figures(results), results.get(self.reference), results.get(self)
        if not figures or before is None:
            return figures if before is not None else None
        first = {name: values for name, values in record["curve"].items() if name.startswith("first_")}
        means = {name: statistics.fmean(values) for name, values in first.items()}
        highest = {f"{name}_max": max(values) for name, values in first.items()}
        grown = figures["base_loss"] - before["metrics"]["base_loss"]
        return {**means, **highest, **figures, "forgotten": grown}

    @classmethod
    def prepare(cls, data: str, settings: Mapping[str, Any], output: Path) -> str:
        return build_material(data, output).fingerprint

    def needs(self, output: Path) -> list[Base]:
        return [] if self.base.path(output).is_file() else [self.base]

    def train(self, output: Path) -> dict[str, Any]:
        return tune(self, load_material(self.corpus, output), output)


def tune(run: Run, material: Material, output: Path) -> dict[str, Any]:
    """Fine-tunes a base and measures it. Returns what `scratch.train` does; `curve` also has each of the first steps."""
    task, model = material.tasks[run.task], run.base.load(material, output)
    record = {"curve": {}, "experts": [], "environment": environment()}
    start, cpu_start = time.perf_counter(), time.process_time()
    phb.patch(model, run.config)
    if run.method.get("limit"):
        phb.get_balancer(model).duals.potential = Limit("limit", run.method["limit"])
    before = choices_on(model, task)
    if run.steps == 0:
        figures = examine(model, task, material, before)
        return {**record, "metrics": {**figures, "run_seconds": time.perf_counter() - start}}
    trained = prepare(model, run.way, run.rank, run.seed)
    if run.method.get("calibrate"):
        ahead = [collate(rows) for rows in itertools.islice(exercises(task, run), run.method["calibrate"])]
        phb.calibrate(trained, ahead, bias=run.method.get("calibrate_bias", False))
    batches = (split(rows, run.micro_batches) for rows in exercises(task, run))
    steps, first = [], {}
    try:
        for step in optimize(trained, batches, run.steps, run.learning_rates[run.way], run.weight_decay):
            steps.append(step)
            if len(steps) == FIRST_STEPS:
                first["rerouted_first"] = changed_share(before, choices_on(trained, task))
        figures = examine(trained, task, material, before)
        if not math.isfinite(figures["loss"]):
            raise Diverged(run.steps)
    except Diverged as error:
        return {**record, "metrics": {"diverged_at": error.args[0]}}
    if run.is_served_plainly:
        shown = [collate(rows) for rows in itertools.islice(exercises(task, run), run.steps)]
        figures |= served_plainly(trained, shown, lambda twin: examine(twin, task, material, before))
    curves = dict(zip(("loss", "max_vio", "gradient_norm"), zip(*steps)))
    figures |= {
        **first,
        "max_vio_train_batch": statistics.fmean(curves["max_vio"][-run.steps // 4 :]),
        "run_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }
    record["curve"] = {name: thin(values) for name, values in curves.items()}
    record["curve"] |= {f"first_{name}": rounded(values[:FIRST_STEPS]) for name, values in curves.items()}
    return {**record, "metrics": figures}


def prepare(model: nn.Module, way: str, rank: int, seed: int) -> nn.Module:
    """Makes the parameters of `way` trainable. Returns the model, or the model with adapters (scale 4)."""
    if way in ADAPTED:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, phb.lora_config(model, router=ADAPTED[way], r=rank, lora_alpha=4 * rank))
    if way == "router":
        routers = {id(p) for site in phb.get_balancer(model).sites for p in site.router.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in routers)
    return model


def exercises(task: Encoded, run: Run) -> Iterator[list[Row]]:
    """Yields the exercises of each step, in random order. All come once before any repeats."""
    rng = random.Random(f"tune {run.seed}")
    rows = max(1, round(run.tokens / statistics.fmean(len(ids) for ids, _ in task.train)))
    ahead: list[Row] = []
    while True:
        while len(ahead) < rows:
            ahead += rng.sample(task.train, len(task.train))
        yield ahead[:rows]
        ahead = ahead[rows:]


def split(rows: list[Row], parts: int) -> list[Batch]:
    """Returns the micro-batches of a step. Their losses add up to the mean over all its labels."""
    batches = [collate(rows[i::parts]) for i in range(parts)]
    labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    return [{**batch, "num_items_in_batch": labels} for batch in batches]


# ---------------------------------------------------------------------- measures


def held_out_batches(task: Encoded, size: int = 32) -> list[Batch]:
    rows = sorted(task.held_out, key=lambda row: len(row[0]))
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


@torch.no_grad()
def choices_on(model: nn.Module, task: Encoded) -> list[Tensor]:
    """Returns the experts `(T, k)` that each layer chooses for the tokens of the held-out exercises, padding left out."""
    was_training = model.training
    model.eval()
    by_batch = []
    for batch in held_out_batches(task):
        with recorded_choices(phb.get_balancer(model)) as chosen:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        by_batch.append([layer[batch["attention_mask"].bool().reshape(-1)] for layer in chosen])
    model.train(was_training)
    return [torch.cat(layer) for layer in zip(*by_batch)]


@torch.no_grad()
def examine(model: nn.Module, task: Encoded, material: Material, before: list[Tensor]) -> dict[str, float]:
    """
    Measures loss, score and balance on held-out exercises, and loss and balance on the bases' text. `before`: the
    base's choices on the exercises.
    """
    balancer = phb.get_balancer(model)
    model.eval()
    total = count = 0.0
    for batch in held_out_batches(task):
        tokens = int((batch["labels"] != IGNORED).sum())
        total, count = total + float(model(**batch).loss) * tokens, count + tokens
    figures = {"loss": total / count}
    if task.grade:
        figures["score"] = score(model, task, material.tokenizer)
    chosen = choices_on(model, task)
    figures["rerouted"] = changed_share(before, chosen)
    experts = balancer.sites[0].num_experts
    loads = [torch.bincount(layer.reshape(-1), minlength=experts) for layer in chosen]
    figures["max_vio_global"] = mean_max_vio(loads)
    own, _ = examine_text(model, balancer, material.validation, rows=8)
    figures |= {f"base_{name}": own[name] for name in own if name.startswith("loss")}
    return {**figures, "base_max_vio": own["max_vio_global"], "domain_information": own["domain_information"]}


@torch.no_grad()
def score(model: nn.Module, task: Encoded, tokenizer) -> float:
    """Returns the share of the graded exercises with a right greedy answer."""
    was_training = model.training
    model.eval()
    judge = {"answer": is_answer, "function": is_function}[task.grade]
    right = 0
    graded = sorted(task.graded, key=lambda row: len(row[0]))
    for start in range(0, len(graded), GRADED_AT_ONCE):
        some = graded[start : start + GRADED_AT_ONCE]
        answers = generate(model, [ids for ids, _ in some], tokenizer, MOST_NEW_TOKENS[task.grade])
        for (ids, reference), answer in zip(some, answers):
            right += judge(tokenizer.decode(ids), answer, reference)
    model.train(was_training)
    return right / len(graded)


def generate(model: nn.Module, prompts: list[list[int]], tokenizer, most: int) -> list[str]:
    """Returns the model's greedy answers, up to the end of text."""
    end = tokenizer.token_to_id(text.END_OF_TEXT)
    longest = max(map(len, prompts))
    written = model.generate(
        input_ids=torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=False,
        max_new_tokens=most,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written[:, longest:].tolist()]


def is_answer(prompt: str, answer: str, reference: str) -> bool:
    """GSM8K's strict match."""
    return score_gsm8k(truncate(answer, GSM8K_STOPS), reference)["strict_match"]


def is_function(prompt: str, answer: str, reference: str) -> bool:
    """Runs the function's checks in the sandbox. A body ends where its indentation does."""
    body = "\n".join(itertools.takewhile(lambda line: not line or line[0] == " ", answer.split("\n")))
    name = prompt[len("def ") : prompt.index("(")]
    return _passes(f"{prompt}{body}\n", reference, name)


@functools.lru_cache(maxsize=100_000)  # most bodies repeat
def _passes(program: str, checks: str, name: str) -> bool:
    try:
        compile(program, "candidate", "exec")
    except (SyntaxError, ValueError):
        return False
    return run_program(program, checks, entry_points=(name,), allow_code_execution=True).passed
