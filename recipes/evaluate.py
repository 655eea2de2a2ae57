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

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hf_phibalance.evaluation import HARNESS_FEWSHOT_SEED


# what the completions depend on, so that those of another run may not be taken for them
SETTINGS = (
    "task", "model_name_or_path", "revision", "dataset_path", "num_fewshot", "fewshot_seed", "apply_chat_template",
    "max_new_tokens", "long_prompts", "batch_size", "num_samples", "temperature", "top_p", "seed", "problem_seed",
    "dtype", "attn_implementation",
)  # fmt: skip


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


def load_tokenizer(args):
    from transformers import AutoTokenizer

    from hf_phibalance.models import base_of_adapter

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    name = args.model_name_or_path
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name, source["revision"] = base_of_adapter(adapter), "main"
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {name} has no pad_token and no eos_token: give it one of them.")
    return tokenizer


def load_model(args, tokenizer):
    """The model in eval mode, patched if it was saved so, with nothing of its own in how it generates."""
    import torch

    import hf_phibalance as phb
    from hf_phibalance.evaluation import reset_generation_config
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
    reset_generation_config(model, tokenizer)
    return model.eval()


def command(args):
    """What to type for the same evaluation."""
    words = ["python", "recipes/evaluate.py"]
    for option in fields(args):
        value = getattr(args, option.name)
        if option.name == "task" or (value not in (None, option.default) and option.name != "overwrite"):
            words += [f"--{option.name}", str(value)]
    return shlex.join(words)


def main(args):
    import torch

    from hf_phibalance import evaluation

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("evaluate.py runs in one process: start it with python, and use --device_map auto.")
    if args.task == "humaneval":
        evaluation.require_opt_in(True if args.confirm_run_unsafe_code else None)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    start = time.monotonic()
    problems, shots = evaluation.load_problems(
        args.task,
        args.dataset_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bad_rows=args.bad_rows,
        problem_seed=args.problem_seed,
    )
    tokenizer = load_tokenizer(args)
    texts = evaluation.make_prompts(args.task, problems, shots, args.num_fewshot, args.fewshot_seed)
    if args.apply_chat_template:
        texts = evaluation.as_chats(texts, tokenizer)
    stops = evaluation.GSM8K_STOPS if args.task == "gsm8k" else evaluation.HUMANEVAL_STOPS
    settings = {
        **{name: value for name, value in asdict(args).items() if name in SETTINGS},
        "model": evaluation.model_fingerprint(args.model_name_or_path, args.revision),
        "problems": len(problems),
        "prompts": evaluation.text_fingerprint(texts),
        "stops": list(stops),
    }
    output = Path(args.output_path)
    kept = output.with_name(f"{output.name.removesuffix('.json')}.completions.jsonl")
    store = evaluation.CompletionStore(kept, settings, args.overwrite)
    resumed = len(store.completions())
    facts = {"prompts_cut", "balance"} if args.balance else {"prompts_cut"}
    if resumed < len(problems) * args.num_samples or not facts <= store.facts.keys():
        fill(store, args, texts, stops, tokenizer)
    generated = time.monotonic()
    metrics, completions = evaluation.score_completions(
        args.task, problems, store.completions(), k=args.attempts, timeout=args.timeout
    )
    result = {
        "task": args.task,
        "command": command(args),
        "date": time.strftime("%Y-%m-%d"),
        "metrics": metrics,
        "problems": len(problems),
        "ended": {how: sum(one["ended"] == how for one in completions) for how in ("eos", "stop", "length")},
        "settings": settings,
        **store.facts,
        "versions": evaluation.versions(),
        "seconds": {
            "generation": round(generated - start, 1),
            "scoring": round(time.monotonic() - generated, 1),
            "completions_from_an_earlier_run": resumed,
        },
        "example_prompt": texts[0],
        "completions": completions,
    }
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, output)
    report(result, output)
    return result


def fill(store, args, texts, stops, tokenizer):
    """Adds to `store` what it lacks: completions, and facts about the model."""
    from hf_phibalance import evaluation

    model = load_model(args, tokenizer)
    prompts, cut = evaluation.tokenize_prompts(
        model,
        tokenizer,
        texts,
        args.max_new_tokens,
        add_special_tokens=not args.apply_chat_template,
        long_prompts=args.long_prompts,
    )
    decoding = evaluation.Decoding(args.max_new_tokens, stops, args.temperature, args.top_p)
    sizes = {"num_samples": args.num_samples, "batch_size": args.batch_size, "seed": args.seed}
    evaluation.complete(model, tokenizer, prompts, decoding, store, **sizes)
    store.add_facts(prompts_cut=cut, parameters=model.num_parameters(), model_dtype=str(model.dtype))
    if not args.balance:
        return
    try:
        evaluation.count_loads(model)
    except ValueError as error:
        print(f"No expert load: {error}", file=sys.stderr)
        balance = None
    else:
        balance = evaluation.expert_load(model, tokenizer, prompts, store.completions(), args.batch_size)
    store.add_facts(balance=balance)


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
