"""
Fine-tune a Mixture-of-Experts model on GSM8K-style word problems with φ-balanced routers, and write a report.

# A tiny model from scratch, offline, on two CPU cores
python recipes/sft.py --config recipes/tiny-cpu/mixtral.yaml

# Any option of the YAML file can be given on the command line
python recipes/sft.py --config recipes/tiny-cpu/mixtral.yaml --coef 0.05 --potential log_cosh --output_dir results/cosh

# GSM8K from JSON lines (a folder with train.jsonl and test.jsonl, or one file), or by its name on the Hub
python recipes/sft.py --model_name_or_path Qwen/Qwen1.5-MoE-A2.7B --dataset_path path/to/gsm8k \
    --learning_rate 1e-5 --num_train_epochs 1 --output_dir results/qwen
python recipes/sft.py --model_name_or_path Qwen/Qwen1.5-MoE-A2.7B --dataset_path openai/gsm8k --output_dir results/qwen

The options are those of `Arguments` below, of `PhiBalanceConfig`, and of TRL's `SFTConfig` and `ModelConfig`. The
results folder then holds the model with its duals, metrics.json, history.json, loads.png, curves.png and a model card.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path


CARD_TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"
STOPS = ("Question:", "</s>", "<|im_end|>")
SHOWN_IN_LOG = {
    "loss": "loss {:.3f}",
    "learning_rate": "lr {:.1e}",
    "moe/max_vio": "MaxVio {:.2f}",
    "moe/dead_experts": "dead experts {:.0f}",
    "eval_loss": "validation: loss {:.3f}",
    "eval_moe/max_vio": "MaxVio {:.2f}",
    "eval_exact_match": "validation: exact match {:.1%}",
}


@dataclass
class Arguments:
    """What is trained on what, and how it is examined."""

    model_type: str | None = field(
        default=None, metadata={"help": "Train a new model of this transformers type from scratch, e.g. mixtral."}
    )
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Config fields of the new model, as a YAML mapping or as JSON."}
    )
    dataset_path: str = field(
        default="toy",
        metadata={
            "help": "'toy' for generated problems, a folder with train.jsonl and test.jsonl, one .jsonl file, or a name "
            "on the Hub; with the fields question and answer."
        },
    )
    dataset_config: str | None = field(default="main", metadata={"help": "Configuration of a dataset on the Hub."})
    train_problems: int | None = field(default=None, metadata={"help": "Train on the first so many (default: all)."})
    validation_problems: int = field(default=64, metadata={"help": "Kept from training, for the curves."})
    test_problems: int | None = field(default=256, metadata={"help": "Held-out problems for the final exact match."})
    problem_seed: int = field(default=0, metadata={"help": "Seed of the generated problems."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest generated answer."})
    generation_batch_size: int = field(default=64, metadata={"help": "Answers generated at a time."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of torch; tiny models gain nothing from a second one."}
    )
    balance: bool = field(default=True, metadata={"help": "false: train without balancing, only count the loads."})
    compare_unbalanced: bool = field(
        default=False, metadata={"help": "First run the same recipe without balancing, and show both."}
    )
    baseline_dir: str | None = field(
        default=None, metadata={"help": "Results folder of an earlier run to show beside this one."}
    )

    def __post_init__(self):
        if isinstance(self.model_config, str):
            self.model_config = json.loads(self.model_config)
        if self.compare_unbalanced and self.baseline_dir:
            raise ValueError(
                f"compare_unbalanced=True and baseline_dir={self.baseline_dir!r}: both give the run to compare with, "
                "set only one of them."
            )


def main(args, balance, training_args, model_args):
    import torch

    import hf_phibalance as phb
    from hf_phibalance import report

    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    if (args.model_type is None) == (model_args.model_name_or_path is None):
        raise ValueError(
            f"model_type={args.model_type!r} and model_name_or_path={model_args.model_name_or_path!r}: give one of "
            "them, model_type for a new model or model_name_or_path for an existing one."
        )
    start = time.monotonic()
    problems = load_problems(args)
    folder = Path(training_args.output_dir)
    unbalanced = phb.PhiBalanceConfig(coef=0.0, bias_coef=0.0)  # counts the loads and changes nothing
    baseline = report.Run.load(args.baseline_dir) if args.baseline_dir else None
    if args.compare_unbalanced:
        print("Training without balancing, for comparison", flush=True)
        baseline = train(args, unbalanced, training_args, model_args, problems, folder / "unbalanced", False)
        baseline.save(folder / "unbalanced")
    print("Training with φ-balanced routers" if args.balance else "Training without balancing", flush=True)
    run = train(args, balance if args.balance else unbalanced, training_args, model_args, problems, folder)
    if training_args.process_index == 0:
        report.write_report(folder, run, baseline, CARD_TEMPLATE)
        report.print_summary(folder, run, baseline, time.monotonic() - start)


def train(args, balance, training_args, model_args, problems, folder, save_model=True):
    """Trains one model into `folder`, and returns what was measured on the way as a `report.Run`."""
    from datasets import Dataset
    from transformers import ProgressCallback, set_seed
    from trl import SFTTrainer, get_peft_config

    import hf_phibalance as phb
    from hf_phibalance import report

    start = time.monotonic()
    training_args = copy.deepcopy(training_args)
    training_args.output_dir, training_args.router_aux_loss_coef = str(folder), 0.0
    set_seed(training_args.seed)
    model, tokenizer = load_model(args, balance, training_args, model_args, problems["train"])
    datasets = {
        split: Dataset.from_list([{"prompt": prompt(row), "completion": f" {row['answer']}"} for row in rows])
        for split, rows in problems.items()
    }
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    phi_balance = phb.attach(trainer)
    examine_callback, progress_callback = make_callbacks(trainer, tokenizer, problems["validation"], args)
    trainer.add_callback(examine_callback)
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress_callback)

    untrained = exact_match(trainer.model, tokenizer, problems["test"], args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.evaluate(datasets["test"], metric_key_prefix="test")
    trained = exact_match(trainer.model, tokenizer, problems["test"], args)
    if save_model:
        trainer.save_model()
    return report.Run.of(
        trainer,
        balance,
        phi_balance.history,
        base_model=model_args.model_name_or_path,
        dataset=args.dataset_path,
        problems={split: len(rows) for split, rows in problems.items()},
        example_prompt=prompt(problems["test"][0]),
        exact_match={"untrained": untrained, "trained": trained},
        seconds=round(time.monotonic() - start, 1),
    )


def load_problems(args):
    """Splits `train`, `validation` and `test` of `{"question", "answer"}` dictionaries."""
    from datasets import load_dataset

    from hf_phibalance import toy

    path = Path(args.dataset_path)
    if args.dataset_path == "toy":
        return toy.make_splits(
            args.train_problems or 32_000, args.validation_problems, args.test_problems or 256, args.problem_seed
        )
    if path.is_dir():
        files = {split: str(path / f"{split}.jsonl") for split in ("train", "test")}
        if missing := [file for file in files.values() if not Path(file).is_file()]:
            raise FileNotFoundError(
                f"dataset_path={args.dataset_path!r} lacks {', '.join(missing)}: give a folder with train.jsonl and "
                "test.jsonl, or one .jsonl file."
            )
        data = load_dataset("json", data_files=files)
    elif path.is_file():
        data = load_dataset("json", data_files=str(path), split="train")
        data = data.train_test_split(args.test_problems or 0.1, seed=args.problem_seed)
    else:
        data = load_dataset(args.dataset_path, args.dataset_config)
    for split in ("train", "test"):
        if missing := {"question", "answer"} - set(data[split].column_names):
            raise ValueError(
                f"dataset_path={args.dataset_path!r}: its {split} split has no {' and no '.join(sorted(missing))}. "
                "Rename its columns to question and answer."
            )
    train = data["train"].to_list()
    validation, train = train[: args.validation_problems], train[args.validation_problems :]
    return {
        "train": train[: args.train_problems],
        "validation": validation,
        "test": data["test"].to_list()[: args.test_problems],
    }


def load_model(args, balance, training_args, model_args, rows):
    """The patched model, new or from a checkpoint, and its tokenizer, which pads on the left as generation needs."""
    from transformers import AutoTokenizer

    import hf_phibalance as phb
    from hf_phibalance import toy

    if args.model_type is not None:
        texts = (f"{prompt(row)} {row['answer']}" for row in rows[:4000])
        tokenizer = toy.train_tokenizer(texts, max_length=training_args.max_length)
        model = toy.build_model(args.model_type, args.model_config or {}, tokenizer)
        return phb.patch(model, balance), tokenizer
    source = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
    }
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left", **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = phb.AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        phi_balance=balance,
        dtype=model_args.dtype or "auto",
        attn_implementation=model_args.attn_implementation,
        **source,
        **(training_args.model_init_kwargs or {}),
    )
    return model, tokenizer


def prompt(row):
    return f"Question: {row['question']}\nAnswer:"


def exact_match(model, tokenizer, rows, args):
    """Share of `rows` whose greedily generated answer is right by the strict-match rule of GSM8K, without examples."""
    from hf_phibalance import toy

    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(rows), args.generation_batch_size):
        batch = rows[start : start + args.generation_batch_size]
        inputs = tokenizer([prompt(row) for row in batch], padding=True, return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=args.max_new_tokens, use_cache=True)
        answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for answer, row in zip(answers, batch):
            for stop in STOPS:
                answer = answer.split(stop)[0]
            right += toy.is_exact_match(answer, row["answer"])
    model.train(was_training)
    return right / max(len(rows), 1)


def make_callbacks(trainer, tokenizer, rows, args):
    """Exact match at every evaluation, logged as `eval_exact_match`; and a progress bar with one short line per log."""
    from transformers import ProgressCallback, TrainerCallback

    class ExactMatchCallback(TrainerCallback):
        def on_step_end(self, training_args, state, control, model=None, **kwargs):
            steps = state.eval_steps
            if training_args.eval_strategy == "steps" and (
                state.global_step % steps == 0 or state.global_step == state.max_steps
            ):
                should_log = control.should_log  # which logging resets
                trainer.log({"eval_exact_match": exact_match(model, tokenizer, rows, args)})
                control.should_log = should_log

    class ShortProgressCallback(ProgressCallback):
        def on_log(self, training_args, state, control, logs=None, **kwargs):
            parts = [text.format(logs[key]) for key, text in SHOWN_IN_LOG.items() if key in (logs or {})]
            if parts and self.training_bar is not None:
                self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(parts))

    return ExactMatchCallback(), ShortProgressCallback()


def make_parser():
    from trl import ModelConfig, SFTConfig, TrlParser

    import hf_phibalance as phb

    @dataclass(frozen=True)
    class BalanceArguments(phb.PhiBalanceConfig):
        potential_kwargs: dict | str | None = None  # JSON on the command line

        def __post_init__(self):
            kwargs = self.potential_kwargs or {}
            object.__setattr__(self, "potential_kwargs", json.loads(kwargs) if isinstance(kwargs, str) else kwargs)
            super().__post_init__()

    return TrlParser((Arguments, BalanceArguments, SFTConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
