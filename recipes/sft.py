"""
Fine-tune a Mixture-of-Experts model on GSM8K or MBPP with φ-balanced routers, and write a report.

# A tiny model from scratch, offline, on two CPU cores
python recipes/sft.py --config recipes/tiny-cpu/mixtral.yaml

# Any option of the YAML file can be given on the command line
python recipes/sft.py --config recipes/tiny-cpu/mixtral.yaml --coef 0.05 --potential log_cosh --output_dir results/cosh

# A real model on several GPUs, see recipes/README.md. With --tiny: a miniature of the model on the CPU, whose results
# go to the folder "...-tiny"
accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/sft.py \
    --config recipes/mixtral-8x7b/gsm8k/phibalance.yaml
python recipes/sft.py --config recipes/mixtral-8x7b/gsm8k/phibalance.yaml --tiny

# GSM8K from JSON lines (a folder with train.jsonl and test.jsonl, or one file) instead of the Hub
python recipes/sft.py --config recipes/olmoe-1b-7b/gsm8k/none.yaml --dataset_path path/to/gsm8k

The options are those of `Arguments` below, of `PhiBalanceConfig`, and of TRL's `SFTConfig` and `ModelConfig`. The
results folder then holds the model with its duals, metrics.json, history.json, loads.png, curves.png and a model card.
"""

import copy
import functools
import json
import logging
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import miniature

import hf_phibalance as phb
from hf_phibalance.files import replace_unprintable
from hf_phibalance.routers import find_routers
from hf_phibalance.tasks import load_rows, make_splits, to_sft_dataset


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that nothing here needs
SHOWN_IN_LOG = {
    "loss": "loss {:.3f}",
    "learning_rate": "lr {:.1e}",
    "moe/max_vio": "MaxVio {:.2f}",
    "moe/dead_experts": "dead experts {:.0f}",
    "eval_loss": "validation: loss {:.3f}",
    "eval_moe/max_vio": "MaxVio {:.2f}",
    "eval_exact_match": "validation: exact match {:.1%}",
}


def option(default, help, choices=None):
    metadata = {"help": help} if choices is None else {"help": help, "choices": choices}
    return field(default=default, metadata=metadata)


def mapping(name, value):
    """Returns the mapping `value` of the option `name`: from YAML as it is, from the command line as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        found = value
    if not isinstance(found, dict):
        raise ValueError(f"{name}={value!r} is no mapping: write it as JSON, such as '{{\"name\": 1}}', or in YAML.")
    return found


@dataclass
class Arguments:
    """The model, its data, and how it is scored."""

    model_type: str | None = option(None, "Train a new model of this transformers type from scratch, e.g. mixtral.")
    model_config: dict | str | None = option(None, "Config fields of the new model, as a YAML mapping or as JSON.")  # noqa: RUF009
    vocab_size: int | None = option(None, "Tokens of the tokenizer that is trained for a new model (default: 640).")
    architecture: str | None = option(
        None,
        "config.json with the published sizes of model_name_or_path, relative to the folder of this script. --tiny "
        "shrinks it, and recipes/memory.py computes from it.",
    )
    tiny: bool = option(
        False,
        "Rehearse the recipe offline in seconds: random weights in a miniature of the architecture, generated data, and "
        + " ".join(miniature.OPTIONS),
    )
    tokenizer_trust_remote_code: bool = option(
        default=False, help="Run the code of the tokenizer, but not that of the model."
    )
    task: str = option("gsm8k", "Task to learn.", ["gsm8k", "mbpp"])
    dataset_path: str = option(
        "toy", "'toy' for generated problems; else a folder, a .jsonl file or a name on the Hub, as in load_rows."
    )
    bad_rows: str = option("refuse", "Malformed rows of the data.", ["refuse", "skip"])
    train_problems: int | None = option(None, "Number of training problems (default: all).")
    validation_problems: int = option(64, "Number of problems kept from training, for the curves.")
    test_problems: int | None = option(256, "Number of held-out problems for the final figures.")
    problem_seed: int = option(0, "Seed of the generated problems, and of splitting a file.")
    max_new_tokens: int = option(256, "Longest generated answer.")
    generation_batch_size: int = option(64, "Answers generated at a time, by each process.")
    global_batch_size: int | None = option(
        None,
        "Rows of one optimizer step over all processes. Sets gradient_accumulation_steps from it and from "
        "per_device_train_batch_size.",
    )
    router_policy: str | None = option(
        None,
        "How routers learn (default: full, with PEFT frozen); with PEFT see phb.lora_config.",
        ["frozen", "lora", "full", "router-only"],
    )
    lora_targets: str | None = option(None, "What else LoRA adapts.", ["all", "experts", "attention"])
    num_threads: int | None = option(None, "CPU threads of torch. Tiny models gain nothing from a second one.")
    balance: bool = option(True, "false: train without balancing, only count the loads.")
    compare_unbalanced: bool = option(False, "First run the same recipe without balancing, and show both.")
    baseline_dir: str | None = option(None, "Results folder of an earlier run to show beside this one.")

    def __post_init__(self):
        self.model_config = mapping("model_config", self.model_config or {})
        for name in ("train_problems", "validation_problems", "test_problems"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number}: the recipe needs at least 1. Leave it out for the default.")
        if self.compare_unbalanced and self.baseline_dir:
            raise ValueError(
                f"compare_unbalanced=True and baseline_dir={self.baseline_dir!r}: both give the run to compare with, "
                "set only one of them."
            )


def main(args, balance, training_args, model_args):
    import datasets
    import torch

    from hf_phibalance.hub import Run, print_summary, write_report
    from hf_phibalance.models import register_deepseek_moe

    datasets.disable_progress_bars()  # dozens of lines for seconds of work
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    check(args, training_args, model_args)
    register_deepseek_moe()
    start = time.monotonic()
    is_main = training_args.process_index == 0
    say = functools.partial(print, flush=True) if is_main else lambda text: None
    problems = load_problems(args)
    folder = Path(training_args.output_dir)
    unbalanced = phb.PhiBalanceConfig(coef=0.0, bias_coef=0.0)  # counts the loads and changes nothing
    baseline = Run.load(args.baseline_dir) if args.baseline_dir else None
    if args.compare_unbalanced:
        say("Training without balancing, for comparison")
        baseline = train(args, unbalanced, training_args, model_args, problems, folder / "unbalanced", False)
        if is_main:
            baseline.save(folder / "unbalanced")
    say("Training with φ-balanced routers" if args.balance else "Training without balancing")
    run = train(args, balance if args.balance else unbalanced, training_args, model_args, problems, folder)
    if is_main:
        write_report(folder, run, baseline)
        print_summary(folder, run, baseline, time.monotonic() - start)


def check(args, training_args, model_args):
    """Raises for options that contradict each other or do nothing. Sets the gradient accumulation."""
    name = model_args.model_name_or_path
    if (args.model_type is None) == (name is None):
        raise ValueError(
            f"model_type={args.model_type!r} and model_name_or_path={name!r}: give one of them, model_type for a new "
            "model or model_name_or_path for an existing one."
        )
    resume = training_args.resume_from_checkpoint
    if args.compare_unbalanced and isinstance(resume, str):
        raise ValueError(
            f"resume_from_checkpoint={resume!r} is a checkpoint of one run, but compare_unbalanced trains two: set "
            "resume_from_checkpoint: true, and each resumes from its own newest checkpoint."
        )
    if args.vocab_size is not None and args.model_type is None:
        raise ValueError(
            f"vocab_size={args.vocab_size} is for a new model (model_type); {name!r} brings its tokenizer."
        )
    if args.tiny and name is not None and args.architecture is None:
        raise ValueError(f"--tiny does not load {name!r} and needs its architecture: the path of a config.json.")
    unused = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "load_in_4bit", "load_in_8bit")
    if given := [name for name in unused if getattr(model_args, name)]:
        raise ValueError(
            f"{', '.join(given)}: this recipe does not use it. router_policy and lora_targets say what LoRA adapts; "
            "quantised training needs a script of its own."
        )
    if not model_args.use_peft and args.router_policy in ("lora", "router-only"):
        raise ValueError(
            f"router_policy={args.router_policy!r} needs adapters: set use_peft=true; or, to train the weights "
            "themselves, router_policy to 'full' or 'frozen'."
        )
    if args.global_batch_size is not None:
        rows = training_args.per_device_train_batch_size
        if args.global_batch_size % (rows * training_args.world_size):
            raise ValueError(
                f"global_batch_size={args.global_batch_size} is no multiple of {rows * training_args.world_size}, the "
                f"rows that {training_args.world_size} process(es) take at once with per_device_train_batch_size={rows}. "
                "Change one of the three."
            )
        training_args.gradient_accumulation_steps = args.global_batch_size // (rows * training_args.world_size)


def train(args, balance, training_args, model_args, problems, folder, save_model=True):
    """Trains one model into `folder`. Returns a `Run` with its measurements."""
    from exact_match import Examiner
    from transformers import ProgressCallback, set_seed
    from trl import SFTTrainer

    from hf_phibalance.hub import Run

    training_args = copy.deepcopy(training_args)
    training_args.output_dir, training_args.router_aux_loss_coef = str(folder), 0.0
    set_seed(training_args.seed)
    model, tokenizer = load_model(args, balance, training_args, model_args, problems["train"])
    training_args.model_init_kwargs = None  # used; TRL would say that it ignores them
    if training_args.process_index == 0:
        print(what_is_trained(model, args, training_args, problems), flush=True)
    datasets = {split: to_sft_dataset(args.task, rows, tokenizer) for split, rows in problems.items()}
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        peft_config=choose_parameters(model, args, model_args),
    )
    if not len(trainer.train_dataset):  # TRL leaves out the rows that it cuts before their answers
        raise ValueError(
            f"max_length={training_args.max_length} is too short: it leaves no answer of the training problems, since the "
            "prompts alone fill it. Raise it."
        )
    phi_balance = phb.attach(trainer, per_layer=16)  # for the table of the card
    examiner = Examiner(trainer, args, datasets["validation"], problems["validation"])
    if examiner.is_able:
        trainer.add_callback(examiner)
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress_callback())

    # With several processes, a trainer that has evaluated no longer wraps its model for training. Each process would
    # then train with its own gradients.
    is_alone = training_args.world_size == 1
    before = trainer.evaluate(datasets["test"], metric_key_prefix="untrained") if is_alone else None
    untrained = examiner.exact_match(datasets["test"], problems["test"])
    resume = training_args.resume_from_checkpoint
    if resume is True:  # a job that died may not have reached this run, or its first checkpoint
        resume = phb.last_checkpoint(folder) is not None
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate(datasets["test"], metric_key_prefix="test")
    trained = examiner.exact_match(datasets["test"], problems["test"])
    if save_model:
        trainer.save_model()
    return Run.of(
        trainer,
        balance,
        phi_balance.history,
        before=before,
        task=args.task,
        base_model=model_args.model_name_or_path,
        dataset=args.dataset_path,
        problems={split: len(rows) for split, rows in problems.items()},
        example_prompt=examiner.prompts(datasets["test"])[0],
        exact_match={"untrained": untrained, "trained": trained},
    )


def what_is_trained(model, args, options, problems):
    """Returns two lines that describe the model and its data."""
    sites = phb.get_balancer(model).sites
    sizes = sorted({(site.num_experts, site.top_k) for site in sites})
    experts = " or ".join(f"{experts} experts, top-{top_k}" for experts, top_k in sizes)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    rows = options.per_device_train_batch_size * options.gradient_accumulation_steps * options.world_size
    steps = math.ceil(len(problems["train"]) / rows * options.num_train_epochs)
    steps = options.max_steps if options.max_steps > 0 else steps
    source = "generated problems" if args.dataset_path == "toy" else f"rows of {args.dataset_path}"
    return (
        f"{model.config.model_type}, {parameters:,.1f} M parameters, {len(sites)} routers of {experts}\n"
        f"{len(problems['train']):,} {source} ({args.task}), {steps:,} steps of {rows} on {options.world_size} x {options.device.type}"
    )


def load_problems(args):
    """Returns the splits `train`, `validation` and `test` of rows."""
    if args.dataset_path == "toy":
        sizes = args.train_problems or 32_000, args.validation_problems, args.test_problems or 256
        return make_splits(*sizes, args.problem_seed) if args.task == "gsm8k" else miniature.toy_functions(*sizes)
    options = {"bad_rows": args.bad_rows}
    if args.task == "gsm8k" and not Path(args.dataset_path).is_file():
        train = load_rows(args.task, args.dataset_path, "train", **options)
        test = load_rows(args.task, args.dataset_path, "test", limit=args.test_problems, **options)
    else:  # one file; or all of MBPP, since HumanEval is the test
        split = "all" if args.task == "mbpp" else "train"
        train = load_rows(args.task, args.dataset_path, split, **options)
        random.Random(args.problem_seed).shuffle(train)
        size = args.test_problems or max(1, len(train) // 10)
        test, train = train[:size], train[size:]
    validation, train = train[: args.validation_problems], train[args.validation_problems :]
    if not train:
        raise ValueError(
            f"dataset_path={args.dataset_path!r} has too few rows for validation_problems={args.validation_problems} "
            f"and test_problems={args.test_problems}: none is left to train on. Lower these."
        )
    return {"train": train[: args.train_problems], "validation": validation, "test": test}


def load_model(args, balance, training_args, model_args, rows):
    """Returns the patched model, new or from a checkpoint, and its tokenizer, which pads on the left for generation."""
    from transformers import AutoTokenizer

    from hf_phibalance.models import build_model, train_tokenizer

    if args.model_type is not None or args.tiny:
        texts = (f"{row['prompt']}{row['completion']}" for row in to_sft_dataset(args.task, rows[:4000]))
        tokenizer = train_tokenizer(texts, args.vocab_size or 640, training_args.max_length)
        if args.model_type is not None:
            model = build_model(args.model_type, args.model_config, tokenizer)
        else:
            model = miniature.build_miniature(args.architecture, tokenizer)
        return phb.patch(model, balance), tokenizer
    name, revision = model_args.model_name_or_path, model_args.model_revision
    trusted = training_args.trust_remote_code or args.tokenizer_trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=trusted, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = phb.AutoModelForCausalLM.from_pretrained(
        name,
        phi_balance=balance,
        dtype=model_args.dtype or "auto",
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=training_args.trust_remote_code,
        revision=revision,
        is_trainable=True,  # of an adapter; other models always are
        **(training_args.model_init_kwargs or {}),
    )
    return model, tokenizer


def choose_parameters(model, args, model_args):
    """Returns the configuration of the adapters. Without adapters, freezes the routers if `router_policy` says so."""
    if not model_args.use_peft:
        if args.router_policy == "frozen":
            for site in find_routers(model):
                for module in site.modules:
                    module.requires_grad_(False)
        return None
    return phb.lora_config(
        model,
        router=args.router_policy or "frozen",
        targets=args.lora_targets,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def progress_callback():
    """Returns a progress bar with one short line per log."""
    from transformers import ProgressCallback

    class ShortProgressCallback(ProgressCallback):
        def on_log(self, training_args, state, control, logs=None, **kwargs):
            parts = [text.format(logs[key]) for key, text in SHOWN_IN_LOG.items() if key in (logs or {})]
            if parts and self.training_bar is not None:
                self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(parts))

    return ShortProgressCallback()


def parse(argv=None):
    """Returns the options of the command line `argv`, then of `--config`, then the defaults."""
    from trl import ModelConfig, SFTConfig, TrlParser

    @dataclass(frozen=True)
    class BalanceArguments(phb.PhiBalanceConfig):
        potential_kwargs: dict | str | None = None  # JSON on the command line

        def __post_init__(self):
            kwargs = mapping("potential_kwargs", self.potential_kwargs or {})
            object.__setattr__(self, "potential_kwargs", kwargs)
            super().__post_init__()

    @dataclass
    class ModelArguments(ModelConfig):
        lora_dropout: float = 0.0  # adapters of parameters (experts, routers) cannot have it

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser((Arguments, BalanceArguments, SFTConfig, ModelArguments))
    # Of all forms (--tiny, --tiny=true, --tiny false, in YAML). Only these options: `SFTConfig` may need those of --tiny.
    first = TrlParser(Arguments, add_help=False).parse_args_and_config(argv, return_remaining_strings=True)[0]
    parsed = parser.parse_args_and_config([*(miniature.OPTIONS if first.tiny else ()), *argv])
    resume = parsed[2].resume_from_checkpoint  # a text on the command line, which transformers takes for a path
    parsed[2].resume_from_checkpoint = {"true": True, "false": False}.get(str(resume).lower(), resume)
    if parsed[0].tiny and not any(word.split("=")[0] == "--output_dir" for word in argv):
        parsed[2].output_dir += "-tiny"  # keeps the results of the recipe
    return parsed


if __name__ == "__main__":
    replace_unprintable()
    main(*parse())
