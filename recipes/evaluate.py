"""
Evaluate a model on GSM8K (strict and flexible match) or HumanEval (pass@k), and write every completion to a JSON file.

# GSM8K as lm-evaluation-harness runs it: 5 shots from the training rows, greedy, 256 new tokens
python recipes/evaluate.py --model_name_or_path results/x --task gsm8k --dataset_path path/to/gsm8k \
    --num_fewshot 5 --batch_size 16 --output_path results/x/eval-gsm8k.json

# HumanEval: the raw prompt, greedy, 1024 new tokens; it runs what the model has written, which you must allow
python recipes/evaluate.py --model_name_or_path results/x --task humaneval --dataset_path path/to/HumanEval.jsonl.gz \
    --confirm_run_unsafe_code --output_path results/x/eval-humaneval.json

# pass@1 and pass@10 from 20 samples
python recipes/evaluate.py --model_name_or_path results/x --task humaneval --dataset_path openai/openai_humaneval \
    --num_samples 20 --temperature 0.2 --top_p 0.95 --k 1,10 --confirm_run_unsafe_code --output_path results/x/pass10.json

# A model of recipes/tiny-cpu, on the problems it was not trained on and without shots, as it was trained
python recipes/evaluate.py --model_name_or_path results/tiny-cpu/mixtral --task gsm8k --dataset_path toy \
    --num_fewshot 0 --max_new_tokens 112 --batch_size 64 --output_path results/tiny-cpu/mixtral/eval.json

The model may be a folder or a name on the Hub, also of a PEFT adapter. What was saved φ-balanced is patched again, so
that a selection bias routes as in training. Completions are kept beside the result, in `<output>.completions.jsonl`;
the same command takes up there after an interruption, with the same result as without one. One process; a model that
needs several GPUs is spread over them by `--device_map auto`.
"""

import hashlib
import json
import os
import random
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


HARNESS_FEWSHOT_SEED = 1234
TOY_PROBLEMS = 256
TOY_SHOT_POOL = 256


@dataclass
class Arguments:
    """What is evaluated on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a model or of a PEFT adapter."})
    output_path: str = field(metadata={"help": "JSON file to write."})
    task: str = field(default="gsm8k", metadata={"help": "gsm8k or humaneval."})
    dataset_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder with test.jsonl and train.jsonl (for the shots), a .jsonl or .jsonl.gz file, a name on the "
            "Hub (default: that of the task), or 'toy' for generated problems in the form of GSM8K."
        },
    )
    bad_rows: str = field(default="refuse", metadata={"help": "What to do with malformed rows: refuse or skip."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many problems."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Shots before each question of GSM8K (default 5); HumanEval has none."}
    )
    fewshot_seed: int = field(
        default=HARNESS_FEWSHOT_SEED, metadata={"help": "Seed of the choice of shots; the default is the harness's."}
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Put the prompt as a user's message, for models that were trained so."}
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Default: 256 for GSM8K, 1024 for HumanEval."})
    long_prompts: str = field(
        default="refuse",
        metadata={"help": "If prompt and new tokens exceed the model's context: refuse, or truncate (on the left)."},
    )
    batch_size: int = field(default=16, metadata={"help": "Completions generated at a time."})
    num_samples: int = field(default=1, metadata={"help": "Completions per problem of HumanEval."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling."})
    k: str | None = field(default=None, metadata={"help": "Which pass@k to report, such as 1,10 (default: 1)."})
    timeout: float = field(default=3.0, metadata={"help": "Seconds for each generated program."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    problem_seed: int = field(default=0, metadata={"help": "Seed of the generated problems, as in sft.py."})
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "Allow generated code to be run; HF_ALLOW_CODE_EVAL=1 does so as well."}
    )
    balance: bool = field(
        default=True,
        metadata={"help": "Also report the expert load over prompts and completions, by one more forward of each."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Start anew, whatever completions there are."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    device_map: str | None = field(default=None, metadata={"help": "Spread the model over devices, e.g. auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})
    revision: str = field(default="main", metadata={"help": "Of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code of a model on the Hub."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch."})

    def __post_init__(self):
        def refuse(name, remedy):
            raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}")

        if self.task not in ("gsm8k", "humaneval"):
            refuse("task", "use gsm8k or humaneval.")
        humaneval = self.task == "humaneval"
        for name in ("limit", "max_new_tokens", "batch_size", "num_samples", "timeout", "num_threads"):
            if (value := getattr(self, name)) is not None and value <= 0:
                refuse(name, "use a positive number.")
        if self.long_prompts not in ("refuse", "truncate"):
            refuse("long_prompts", "use refuse or truncate.")
        if self.num_fewshot is None:
            self.num_fewshot = 0 if humaneval else 5
        if self.num_fewshot < 0 or (humaneval and self.num_fewshot):
            refuse("num_fewshot", "use 0, HumanEval has no shots." if humaneval else "use 0 or more.")
        if self.max_new_tokens is None:
            self.max_new_tokens = 1024 if humaneval else 256
        if not humaneval and self.num_samples != 1:
            refuse("num_samples", "GSM8K is scored with one answer per problem; leave it at 1.")
        if not humaneval and self.k is not None:
            refuse("k", "only HumanEval has pass@k; leave it out.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}: use temperature >= 0 and 0 < top_p <= 1."
            )
        if self.temperature == 0 and self.num_samples > 1:
            refuse("num_samples", "greedy samples are all alike; set temperature above 0.")
        if self.temperature == 0 and self.top_p < 1:
            refuse("top_p", "it does nothing to greedy completions; set temperature above 0.")
        if self.device is not None and self.device_map is not None:
            refuse("device_map", f"give it or device={self.device!r}, not both.")
        if humaneval and self.dataset_path == "toy":
            refuse("dataset_path", "the generated problems are for gsm8k.")
        parts = [part.strip() for part in str(self.k or "1").strip("[]()").split(",")]
        if not all(part.isdigit() and 1 <= int(part) <= self.num_samples for part in parts):
            refuse("k", f"give numbers from 1 to num_samples={self.num_samples}, such as 1,10.")
        self.attempts = sorted({int(part) for part in parts})


# ---------------------------------------------------------------------- problems


def load_problems(args):
    """`(problems, shots)`: test rows, and the training rows of which shots are drawn."""
    from hf_phibalance.tasks import TASKS, load_rows, make_splits

    if args.dataset_path == "toy":
        pool = max(TOY_SHOT_POOL, args.num_fewshot) if args.num_fewshot else 0
        splits = make_splits(pool, 0, args.limit or TOY_PROBLEMS, args.problem_seed)
        return splits["test"], splits["train"]
    source = args.dataset_path or TASKS[args.task].hub_name
    problems = load_rows(args.task, source, "test", bad_rows=args.bad_rows, limit=args.limit)
    shots = []
    if args.num_fewshot:
        if Path(source).is_file():
            raise ValueError(
                f"dataset_path={source!r} is one file, which has no training rows to draw shots from: give the folder "
                "with train.jsonl and test.jsonl, or num_fewshot=0."
            )
        shots = load_rows(args.task, source, "train", bad_rows=args.bad_rows)
        if len(shots) < args.num_fewshot:
            raise ValueError(f"num_fewshot={args.num_fewshot}: there are only {len(shots)} training rows.")
    return problems, shots


def make_prompts(args, problems, shots, tokenizer):
    """The texts that are put to the model, in the order of `problems`."""
    from hf_phibalance.tasks import TASKS

    task = TASKS[args.task]
    draw = random.Random(args.fewshot_seed)  # each problem has shots of its own, drawn as the harness does
    texts = []
    for problem in problems:
        drawn = draw.sample(shots, args.num_fewshot) if args.num_fewshot else []
        examples = [f"{task.prompt(row)}{task.completion(row)}\n\n" for row in drawn]
        texts.append("".join(examples) + task.prompt(problem))
    if args.apply_chat_template:
        if not tokenizer.chat_template:
            raise ValueError(f"apply_chat_template=True, but the tokenizer of {args.model_name_or_path} has none.")
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return texts


def problem_ids(args, problems):
    return [problem["task_id"] if args.task == "humaneval" else index for index, problem in enumerate(problems)]


# ---------------------------------------------------------------------- model


def load_tokenizer(args):
    from transformers import AutoTokenizer

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    name = args.model_name_or_path
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name, source["revision"] = json.loads(adapter.read_text())["base_model_name_or_path"], "main"
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {name} has no pad_token and no eos_token: give it one of them.")
    return tokenizer


def load_model(args, tokenizer):
    """The model in eval mode, patched if it was saved so, with nothing of its own in how it generates."""
    import torch
    from transformers import GenerationConfig

    import hf_phibalance as phb
    from hf_phibalance.models import register_deepseek_moe

    register_deepseek_moe()
    model = phb.AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        dtype=args.dtype,
        device_map=args.device_map,
        attn_implementation=args.attn_implementation,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.device_map is None:
        model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends - {None}) or None, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval()


def identify_model(args):
    """What tells one model from another of the same name: its files with their sizes and times, or its commit."""
    path = Path(args.model_name_or_path)
    if not path.is_dir():
        return args.revision
    kinds = (".safetensors", ".bin", "config.json")
    files = sorted(file for file in path.iterdir() if file.name.endswith(kinds))
    listed = "".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- generation


def tokenize(args, texts, tokenizer, context):
    """Token ids of the prompts and how many were cut; `context` is the longest sequence of the model, or `None`."""
    ids = tokenizer(texts, add_special_tokens=not args.apply_chat_template)["input_ids"]
    if empty := [index for index, own in enumerate(ids) if not own]:
        raise ValueError(f"the prompts of {len(empty)} problems are empty, the first is problem {empty[0]}.")
    room = None if context is None else context - args.max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens={args.max_new_tokens}: the model's context is {context} tokens, which leaves nothing for "
            "the prompt. Lower it."
        )
    long = [len(own) for own in ids if room is not None and len(own) > room]
    if long and args.long_prompts == "refuse":
        raise ValueError(
            f"{len(long)} of {len(ids)} prompts, the longest of {max(long)} tokens, and max_new_tokens="
            f"{args.max_new_tokens} exceed the model's context of {context} tokens. Lower max_new_tokens or "
            "num_fewshot, or cut the prompts on the left with --long_prompts truncate."
        )
    return [own[-room:] if room is not None else own for own in ids], len(long)


def generate(args, model, tokenizer, prompts, seed, stops):
    """Completions of a batch of prompts (lists of ids), as `(text, tokens, how it ended)`."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    from hf_phibalance.evaluation import truncate

    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    tail = max(map(len, stops)) + 1  # tokens; each writes at least one character of a stop string

    class StopAtText(StoppingCriteria):
        """Ends a row whose completion holds a stop string; the prompt does not count, unlike in `stop_strings=`."""

        def __call__(self, input_ids, scores, **kwargs):
            ends = tokenizer.batch_decode(input_ids[:, longest:][:, -tail:], clean_up_tokenization_spaces=False)
            found = [any(stop in end for stop in stops) for end in ends]
            return torch.tensor(found, device=input_ids.device)

    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if args.temperature > 0 else {"do_sample": False}),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    torch.manual_seed(seed)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, generation_config=config, stopping_criteria=StoppingCriteriaList([StopAtText()])
        )
    ends = set(config.eos_token_id or [])
    for ids in tokens[:, longest:].tolist():
        own = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
        whole = tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = truncate(whole, stops)
        if text == whole and len(own) < len(ids):
            ended = "eos"
        else:
            ended = "length" if text == whole and len(ids) == args.max_new_tokens else "stop"
        yield text, sum(token != tokenizer.pad_token_id for token in own), ended


def complete(args, requests, ids, model, tokenizer, stops, store):
    """
    Fills `store` with the completions that it lacks.

    The batches are the same whether or not some are there already, and each has its seed: what an interrupted run
    and its resumption give together is what one run gives.
    """
    from tqdm.auto import tqdm

    order = sorted(requests, key=lambda request: (-len(ids[request[0]]), request))  # the longest first, together
    batches = [order[at : at + args.batch_size] for at in range(0, len(order), args.batch_size)]
    done = sum(len(batch) for number, batch in enumerate(batches) if number in store.batches)
    with tqdm(total=len(order), initial=done, desc="Completions", unit="") as bar:
        for number, batch in enumerate(batches):
            if number in store.batches:
                continue
            prompts = [ids[index] for index, _ in batch]
            outcomes = generate(args, model, tokenizer, prompts, args.seed + number, stops)
            store.add(
                number,
                [
                    {"index": index, "sample": sample, "completion": text, "tokens": tokens, "ended": ended}
                    for (index, sample), (text, tokens, ended) in zip(batch, outcomes)
                ],
            )
            bar.update(len(batch))


class Store:
    """
    Completions on disk, as JSON lines: the settings, then one line per batch, then facts about the model.

    A line that a kill has cut off is dropped; a file made with other settings is refused.

    Args:
        path (`Path`): the file.
        settings (`dict`): what the completions depend on.
        overwrite (`bool`): start anew.
    """

    def __init__(self, path, settings, overwrite):
        self.path, self.batches, self.facts = path, {}, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if overwrite or not path.exists() else self._complete_lines()
        if not lines:
            path.write_text(json.dumps({"settings": settings}) + "\n")
            return
        found = lines[0].get("settings") if isinstance(lines[0], dict) else None
        if found != settings:
            other = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
            listed = ", ".join(f"{name}={(found or {}).get(name)!r} (now {settings[name]!r})" for name in other)
            raise ValueError(
                f"{path} holds completions that were made with other settings: {listed or 'unknown ones'}. Use another "
                "output_path, or replace them with --overwrite."
            )
        for line in lines[1:]:
            if "batch" in line:
                self.batches[line["batch"]] = line["completions"]
            else:
                self.facts |= line["facts"]

    def _complete_lines(self):
        """What the file holds, after cutting off a last line that was not written to its end."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a file of completions ({error}). Use another output_path, or replace it with "
                "--overwrite."
            ) from None

    def _write(self, line):
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, number, completions):
        self._write({"batch": number, "completions": completions})
        self.batches[number] = completions

    def add_facts(self, **facts):
        self._write({"facts": facts})
        self.facts |= facts

    def completions(self):
        """All of them, in the order of the problems."""
        found = [completion for batch in self.batches.values() for completion in batch]
        return sorted(found, key=lambda completion: (completion["index"], completion["sample"]))


def expert_load(args, model, tokenizer, ids, completions):
    """
    Balance over the tokens of all prompts and completions: the metrics of the package, or `None` without routers.

    Generation is not counted, so the texts are read once more, by the backbone only.
    """
    import torch
    from tqdm.auto import tqdm

    import hf_phibalance as phb
    from hf_phibalance.balancing.patching import find_patch

    if find_patch(model) is None:
        try:
            phb.patch(model, phb.PhiBalanceConfig(coef=0.0, bias_coef=0.0))  # counts and changes nothing
        except ValueError as error:
            print(f"No expert load: {error}", file=sys.stderr)
            return None
    texts = [tokenizer(entry["completion"], add_special_tokens=False)["input_ids"] for entry in completions]
    texts = sorted((ids[entry["index"]] + own for entry, own in zip(completions, texts)), key=len, reverse=True)
    balancer = phb.get_balancer(model)
    with balancer.evaluation(), torch.inference_mode():
        for at in tqdm(range(0, len(texts), args.batch_size), desc="Expert load", unit="batch"):
            rows = [torch.tensor(text) for text in texts[at : at + args.batch_size]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            lengths = torch.tensor([[len(row)] for row in rows])
            mask = (torch.arange(tokens.shape[1]) < lengths).long().to(model.device)
            tokens = tokens.to(model.device)
            with balancer.labels_of(tokens.masked_fill(mask == 0, -100)):  # for token_mask="labels": count all
                model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return balancer.eval_metrics(per_layer=0)


# ---------------------------------------------------------------------- scores


def score(args, problems, completions):
    """`(metrics, verdicts)`: the verdicts in the order of `completions`."""
    from tqdm.auto import tqdm

    from hf_phibalance.evaluation import GSM8KAccuracy, HumanEvalPassAtK

    texts = [completion["completion"] for completion in completions]
    if args.task == "gsm8k":
        references = [problems[completion["index"]]["answer"] for completion in completions]
        metrics = GSM8KAccuracy().compute(predictions=texts, references=references, details=True)
        return metrics, metrics.pop("results")
    grouped = [texts[at : at + args.num_samples] for at in range(0, len(texts), args.num_samples)]
    with tqdm(total=len(texts), desc="Programs", unit="") as bar:
        metrics = HumanEvalPassAtK().compute(
            predictions=grouped,
            references=problems,
            k=args.attempts,
            timeout=args.timeout,
            allow_code_execution=True,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    return metrics, [verdict for own in metrics.pop("results") for verdict in own]


def command(args):
    """What to type for the same evaluation."""
    words = ["python", "recipes/evaluate.py"]
    for option in fields(args):
        value = getattr(args, option.name)
        if option.name == "task" or (value not in (None, option.default) and option.name != "overwrite"):
            words += [f"--{option.name}", str(value)]
    return shlex.join(words)


def versions():
    import platform
    from importlib.metadata import version

    names = ("torch", "transformers", "hf_phibalance", "evaluate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def main(args):
    import torch

    from hf_phibalance.evaluation import GSM8K_STOPS, HUMANEVAL_STOPS, require_opt_in

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("evaluate.py runs in one process: start it with python, and use --device_map auto.")
    if args.task == "humaneval":
        require_opt_in(True if args.confirm_run_unsafe_code else None)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    start = time.monotonic()
    problems, shots = load_problems(args)
    tokenizer = load_tokenizer(args)
    texts = make_prompts(args, problems, shots, tokenizer)
    stops = GSM8K_STOPS if args.task == "gsm8k" else HUMANEVAL_STOPS

    names = (
        "task model_name_or_path revision dataset_path num_fewshot fewshot_seed apply_chat_template max_new_tokens "
        "long_prompts batch_size num_samples temperature top_p seed problem_seed dtype attn_implementation"
    )
    settings = {
        **{name: value for name, value in asdict(args).items() if name in names.split()},
        "model": identify_model(args),
        "problems": len(problems),
        "prompts": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        "stops": list(stops),
    }
    output = Path(args.output_path)
    store = Store(output.with_name(f"{output.name.removesuffix('.json')}.completions.jsonl"), settings, args.overwrite)

    requests = [(index, sample) for index in range(len(problems)) for sample in range(args.num_samples)]
    resumed = len(store.completions())
    if (
        len(store.completions()) < len(requests)
        or "prompts_cut" not in store.facts
        or (args.balance and "balance" not in store.facts)
    ):
        model = load_model(args, tokenizer)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ids, cut = tokenize(args, texts, tokenizer, context)
        complete(args, requests, ids, model, tokenizer, stops, store)
        store.add_facts(prompts_cut=cut, parameters=model.num_parameters(), model_dtype=str(model.dtype))
        if args.balance:
            store.add_facts(balance=expert_load(args, model, tokenizer, ids, store.completions()))
    generated = time.monotonic()
    completions = store.completions()
    metrics, verdicts = score(args, problems, completions)
    names = problem_ids(args, problems)
    result = {
        "task": args.task,
        "command": command(args),
        "date": time.strftime("%Y-%m-%d"),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "problems": len(problems),
        "ended": {how: sum(one["ended"] == how for one in completions) for how in ("eos", "stop", "length")},
        "settings": settings,
        **store.facts,
        "versions": versions(),
        "seconds": {
            "generation": round(generated - start, 1),
            "scoring": round(time.monotonic() - generated, 1),
            "completions_from_an_earlier_run": resumed,
        },
        "example_prompt": texts[0],
        "completions": [{"id": names[one["index"]], **one, **verdict} for one, verdict in zip(completions, verdicts)],
    }
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, output)
    report(result, output)
    return result


def report(result, output):
    from rich.console import Console
    from rich.table import Table

    table = Table("", f"{result['problems']} problems")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.2%}")
    for how, number in result["ended"].items():
        table.add_row(f"ended by {how}", str(number))
    for key, label in (("max_vio", "MaxVio"), ("gini", "Gini")):
        if result.get("balance"):
            table.add_row(label, f"{result['balance'][key]:.3f}")
    console = Console()
    console.print(table)
    console.print(f"Every completion: {output}", soft_wrap=True)


def make_parser():
    from trl import TrlParser

    return TrlParser(Arguments)


if __name__ == "__main__":
    # Python looks for modules beside a script first: without this, `import evaluate` would find the script itself
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    main(*make_parser().parse_args_and_config())
