"""
Fine-tuning a real language model: a run tunes an upcycled model on GSM8K by TRL's `SFTTrainer`, in full and in bf16 autocast.

The model is made by `recipes/smollm2-moe/upcycle.py`. A file of plans has these fields besides those of [`harness`]:

```yaml
kind: real
starts:
  new routers: {}          # fields of `Start`, by name
  uneven: {steps: 100}
```
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import hf_phibalance as phb
from hf_phibalance.evaluation import GSM8K_STOPS, score_gsm8k, truncate
from hf_phibalance.routers import find_routers
from hf_phibalance.tasks import TASKS, load_rows, to_sft_dataset

from . import harness, text
from .measures import SMOOTH, count_by_window, examine_text, mean_max_vio, recorded_choices, rounded
from .training import Diverged, environment


KEYS = ("starts",)
HELD_OUT = 96  # training problems that are kept for the loss on their answers
TESTED = 100  # test problems that are answered at the end
LONGEST_ANSWER = 200  # tokens
WINDOW = 128  # tokens of a window of text
WINDOWS = 32  # of each domain
AT_ONCE = 8  # held-out problems or windows of a forward
EVEN = 0.15  # mean MaxVio of `SMOOTH` steps that count as even; chance alone gives about 0.06 in each
CURVES = {"loss": "loss", "max_vio": "moe/max_vio"}  # figures of each step, by their names in the log

Rows = list[dict[str, Any]]


def axes(content: Mapping[str, Any]) -> dict[str, dict[str, Start]]:
    try:
        return {"starts": {name: Start(name=name, **(given or {})) for name, given in content["starts"].items()}}
    except TypeError as error:
        raise ValueError(f"a start has an unknown field: {error}") from error


# ---------------------------------------------------------------------- data


def prepare_data(source: str, cache: Path) -> str:
    """
    Reads GSM8K, MBPP and WikiText-2 from the folder `source`, and keeps what the runs use in the folder `cache`. Returns its
    fingerprint.
    """
    folder = Path(source)
    problems = load_rows("gsm8k", str(folder / "gsm8k"), "train")
    random.Random("gsm8k").shuffle(problems)
    code = load_rows("mbpp", str(folder / "mbpp"), "all")
    texts = {
        "problems": [f"{row['question']}\n{row['answer']}" for row in problems[:HELD_OUT]],
        "prose": text.read_documents(source)["prose"][:8],
        "python": [f"{TASKS['mbpp'].prompt(row)}{TASKS['mbpp'].completion(row)}" for row in code[:200]],
    }
    tests = load_rows("gsm8k", str(folder / "gsm8k"), "test", limit=TESTED)
    fields = {"train": problems[HELD_OUT:], "held_out": problems[:HELD_OUT], "test": tests, "texts": texts}
    written = json.dumps(fields, sort_keys=True)
    fingerprint = hashlib.sha256(written.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    (cache / f"data-{fingerprint}.json").write_text(written, encoding="utf-8")
    return fingerprint


def load_data(fingerprint: str, cache: Path) -> dict[str, Any]:
    return json.loads((cache / f"data-{fingerprint}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- starts


@dataclass(frozen=True, kw_only=True)
class Start:
    """
    The upcycled model: with routers drawn by the run's seed, or trained for some steps without balancing, by the defaults of [`Run`].

    Runs are found again by the folder's name, not by the weights in it. So other weights need another folder.
    """

    name: str
    model: str = "results/smollm2-moe/base"  # folder of the upcycled model
    steps: int = 0
    seed: int = 100
    corpus: str = ""  # fingerprint of the data

    @property
    def key(self) -> str:
        fields = dataclasses.asdict(self)
        return harness.key_of({name: fields[name] for name in ("model", "steps", "seed")})

    def __str__(self) -> str:
        return f"start {self.name}"

    def path(self, output: Path) -> Path:
        return output / "starts" / f"{self.key}-{self.corpus}.pt"

    def load(self, seed: int, output: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        if not Path(self.model, "config.json").is_file():
            raise FileNotFoundError(
                f"{self.model!r} holds no model; recipes/smollm2-moe/README.md shows how to make it."
            )
        # the fastest experts for so few tokens on the CPU
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, experts_implementation="eager")
        if self.steps:
            model.load_state_dict(text.load_tensors(self.path(output)))
            return model
        generator = torch.Generator().manual_seed(seed)
        for site in find_routers(model):
            nn.init.normal_(site.router.weight, std=model.config.initializer_range, generator=generator)
        return model

    def train(self, output: Path) -> None:
        """Trains new routers with all else, without balancing, and writes the weights."""
        fresh = dataclasses.replace(self, steps=0)
        run = Run(start=fresh, seed=self.seed, method={"method": "none"}, steps=self.steps, corpus=self.corpus)
        trainer = fit(run, load_data(self.corpus, output), output)
        text.save_tensors(phb.unpatch(trainer.model).state_dict(), self.path(output))


# ---------------------------------------------------------------------- runs


@dataclass(kw_only=True)
class Run(harness.Run):
    """
    A fine-tuning run. `method` may also have `built_in`: the model is only watched, and TRL adds the built-in auxiliary loss as it
    does by itself; and `muon`: matrices learn by Muon, the rest by AdamW.
    """

    own_arguments: ClassVar[tuple[str, ...]] = ("built_in", "muon")

    start: Start
    steps: int = 100
    rows: int = 4  # problems of a step, about 800 tokens
    learning_rate: float = 1e-4  # peak

    def __post_init__(self) -> None:
        self.start = dataclasses.replace(self.start, corpus=self.corpus)

    def __str__(self) -> str:
        method = " ".join(f"{name}={value}" for name, value in self.method.items())
        return f"{self.start.name}, {self.steps} steps, seed {self.seed}  {method}"

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"start": self.start.key}

    @property
    def reference(self) -> Run:
        """Returns a run of 0 steps, which measures the start."""
        return dataclasses.replace(self, method={"method": "none"}, steps=0, seed=0)

    def figures(self, results: harness.Results) -> dict[str, float] | None:
        """Adds `forgotten`, the growth of the loss on WikiText-2, and `steps_until_even`."""
        figures, before = super().figures(results), results.get(self.reference)
        if not figures or before is None:
            return figures
        until = steps_until_even(results.get(self)["curve"].get("max_vio", []))
        return {
            **figures,
            "forgotten": figures["loss_prose"] - before["metrics"]["loss_prose"],
            "steps_until_even": until,
        }

    @classmethod
    def prepare(cls, data: str, settings: Mapping[str, Any], output: Path) -> str:
        return prepare_data(data, output)

    def needs(self, output: Path) -> list[Start]:
        return [self.start] if self.start.steps and not self.start.path(output).is_file() else []

    def train(self, output: Path) -> dict[str, Any]:
        data, started, cpu_started = load_data(self.corpus, output), time.perf_counter(), time.process_time()
        trainer = fit(self, data, output)
        steps = [entry for entry in trainer.state.log_history if "moe/max_vio" in entry and "loss" in entry]
        curve = {name: rounded([step[key] for step in steps]) for name, key in CURVES.items()}
        record = {"environment": environment(), "experts": [], "curve": curve}
        try:
            figures = on_answers(trainer) | on_text(trainer, data["texts"])
            if self.is_served_plainly:
                with phb.get_balancer(trainer.model).without_bias():
                    figures |= {f"dropped_{name}": value for name, value in on_answers(trainer).items()}
        except Diverged:
            return {**record, "metrics": {"diverged_at": self.steps}}
        figures |= {
            "score": score(trainer, data["test"]),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "run_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
        }
        return {**record, "metrics": figures}


def fit(run: Run, data: Mapping[str, Any], output: Path):
    """Trains the run's start. Returns its trainer."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = run.start.load(run.seed, output)
    tokenizer = AutoTokenizer.from_pretrained(run.start.model, padding_side="left")
    chosen = random.Random(f"real {run.seed}").sample(data["train"], max(1, run.steps) * run.rows)
    is_built_in = run.method.get("built_in", False)
    if not is_built_in:
        phb.patch(model, run.config)
    options = SFTConfig(
        str(output / "trainer"),
        max_steps=run.steps,
        per_device_train_batch_size=run.rows,
        per_device_eval_batch_size=AT_ONCE,
        learning_rate=run.learning_rate,
        warmup_steps=run.steps // 20,
        router_aux_loss_coef=None if is_built_in else 0.0,
        bf16=True,
        use_cpu=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
    )
    trainer = SFTTrainer(
        model,
        options,
        optimizers=(Muon(model, run.learning_rate) if run.method.get("muon") else None, None),
        train_dataset=to_sft_dataset("gsm8k", chosen, tokenizer),
        eval_dataset=to_sft_dataset("gsm8k", data["held_out"], tokenizer),
        processing_class=tokenizer,
    )
    if is_built_in:
        phb.watch(trainer)
    if run.steps:
        trainer.train()
    model.config.output_router_logits = False  # the built-in loss is no part of what is measured
    return trainer


class Muon(torch.optim.Muon):
    """Muon for matrices, at the step length of AdamW; AdamW for embeddings and vectors. Each matrix of each expert is one of its own."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        tables = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
        others = [p for p in model.parameters() if p.ndim < 2 or id(p) in tables]
        # torch's Muon takes no parameters of three dimensions
        self.experts = [(n, p, matrices_of(n, p.detach())) for n, p in model.named_parameters() if p.ndim == 3]
        parts = [part.requires_grad_() for _, _, parts in self.experts for part in parts]
        super().__init__([*matrices, *parts], learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, learning_rate, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for name, parameter, parts in self.experts:
            for part, gradient in zip(parts, matrices_of(name, parameter.grad)):
                part.grad = gradient
        self.adamw.param_groups[0]["lr"] = self.param_groups[0]["lr"]  # the schedule changes Muon's
        super().step()
        self.adamw.step()
        for _, _, parts in self.experts:
            for part in parts:
                part.grad = None  # or two sets of gradients live in the next backward


def matrices_of(name: str, weights: Tensor) -> tuple[Tensor, ...]:
    """Returns views of the matrices of all experts. `gate_up_proj` holds two for each."""
    halves = 2 if name.endswith("gate_up_proj") else 1
    return weights.unflatten(1, (halves, -1)).flatten(0, 1).unbind()


# ---------------------------------------------------------------------- measures


@torch.no_grad()
def on_answers(trainer: Any) -> dict[str, float]:
    """Measures loss and balance on the held-out problems, given their questions. Raises `Diverged` if the loss is not finite."""
    model, balancer = trainer.model, phb.get_balancer(trainer.model)
    model.eval()
    experts = balancer.sites[0].num_experts
    total = count = 0
    loads_LE = torch.zeros(len(balancer.sites), experts)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in trainer.get_eval_dataloader():
            with recorded_choices(balancer) as chosen:
                loss = model(**batch).loss
            labels = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(loss) * labels, count + labels
            is_token = batch["attention_mask"].bool().reshape(-1)
            loads_LE += count_by_window([layer[is_token] for layer in chosen], 1, experts)[0]
    if not math.isfinite(total):
        raise Diverged
    max_vios = {"max_vio_global": mean_max_vio(loads_LE), "max_vio_first": mean_max_vio(loads_LE[:1])}
    return {"loss": total / count, **max_vios}


@torch.no_grad()
def on_text(trainer: Any, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Measures loss and balance on text of each domain."""
    tokenizer = trainer.processing_class.backend_tokenizer
    windows = {
        domain: text.spread_over(text.windows(tokenizer, documents, WINDOW), WINDOWS, domain)
        for domain, documents in texts.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = examine_text(trainer.model, phb.get_balancer(trainer.model), windows, rows=8, batch=AT_ONCE)
    figures = {name: value for name, value in found.items() if name.startswith("loss_")}
    return figures | {
        "base_max_vio": found["max_vio_global"],
        "domain_information": found["domain_information"],
    }


@torch.no_grad()
def score(trainer: Any, rows: Rows) -> float:
    """Returns the share of `rows` with a right greedy answer, by GSM8K's strict match."""
    model, tokenizer = trainer.model, trainer.processing_class
    model.eval()
    prompts = to_sft_dataset("gsm8k", rows, tokenizer)["prompt"]
    inputs = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [
        score_gsm8k(truncate(answer, GSM8K_STOPS), row["answer"])["strict_match"] for answer, row in zip(answers, rows)
    ]
    return sum(right) / len(right)


def steps_until_even(max_vios: Sequence[float]) -> int:
    """Returns the first step at which the mean MaxVio of the last `SMOOTH` steps is at most `EVEN`; all steps if there is none."""
    means = [statistics.fmean(max_vios[i - SMOOTH : i]) for i in range(SMOOTH, len(max_vios) + 1)]
    return next((step for step, mean in enumerate(means, SMOOTH) if mean <= EVEN), len(max_vios))
