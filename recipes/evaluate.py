"""
Evaluate a model with lm-evaluation-harness on GSM8K, HumanEval, or any other of its tasks.

# GSM8K: 5 shots from the training rows, greedy, 256 new tokens
python recipes/evaluate.py --model_name_or_path results/x --task gsm8k

# HumanEval runs the model's code, in a sandbox. You must allow it
python recipes/evaluate.py --model_name_or_path results/x --task humaneval --confirm_run_unsafe_code

# pass@1 and pass@10 from 20 samples
python recipes/evaluate.py --model_name_or_path results/x --task humaneval --confirm_run_unsafe_code \
    --num_samples 20 --temperature 0.2 --top_p 0.95 --k 1,10

# local files instead of the Hub: a folder with train.jsonl and test.jsonl, or one file with the problems
python recipes/evaluate.py --model_name_or_path results/x --task gsm8k --dataset_path path/to/gsm8k

# generated problems, for the models of recipes/tiny-cpu
python recipes/evaluate.py --model_name_or_path results/tiny-cpu/mixtral --task made --batch_size 64

# a chat model; several GPUs; vLLM
python recipes/evaluate.py --model_name_or_path me/chat --apply_chat_template --chat_template_args '{"enable_thinking": false}'
accelerate launch recipes/evaluate.py --model_name_or_path results/x
python recipes/evaluate.py --model_name_or_path results/x --backend vllm --model_args gpu_memory_utilization=0.9

The model may be a folder or a name on the Hub, also of a PEFT adapter. A model that was saved with φ-balancing is patched
again, so that its selection bias applies. Results and samples are written to `--output_path`, by default the folder
`eval` of a local model. After an interruption, the same command reuses the greedy completions from there.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hf_phibalance.files import replace_unprintable


OWN_TASKS = ("gsm8k", "humaneval", "made")


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    """The model, its task, and how it generates."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a model or of a PEFT adapter."})
    task: str = option("gsm8k", "gsm8k, humaneval, made, or a task of the harness.")
    output_path: str | None = option(None, "Folder for the results (default: eval in the folder of the model).")
    dataset_path: str | None = option(None, "Folder, file or Hub name of the problems of gsm8k or humaneval.")
    backend: str = option("hf", "hf (transformers) or vllm.")
    model_args: str = option("", "More arguments for the harness's model, as name=value,...")
    limit: int | None = option(None, "Number of problems (default: all).")
    num_fewshot: int | None = option(None, "Shots before each problem (default: the task's).")
    apply_chat_template: bool = option(False, "Put prompts as messages of a user.")
    chat_template_args: str = option("{}", "Arguments of the chat template, as JSON.")
    system_instruction: str | None = option(None, "System message before each problem.")
    max_new_tokens: int | None = option(None, "Default: the task's.")
    batch_size: str = option("16", "Completions generated at a time, or auto.")
    num_samples: int = option(1, "Completions per problem of HumanEval.")
    temperature: float = option(0.0, "0 is greedy.")
    top_p: float = option(1.0, "Nucleus of the sampling.")
    k: str = option("1", "Which pass@k to report, such as 1,10.")
    timeout: float = option(3.0, "Seconds for each generated program.")
    seed: int = option(1234, "Seed of the sampling.")
    confirm_run_unsafe_code: bool = option(False, "Allow generated code to run; HF_ALLOW_CODE_EVAL=1 does so as well.")
    unsafe: bool = option(False, "Where there is no bubblewrap: run generated code without a sandbox.")
    use_cache: bool = option(True, "Keep greedy completions, so that a restart finds them.")
    dtype: str = option("auto", "auto (as saved), float32, bfloat16 or float16.")
    device: str | None = option(None, "Default: cuda if there is one, else cpu.")
    attn_implementation: str | None = option(None, "As in from_pretrained.")
    revision: str = option("main", "Of the model on the Hub.")
    trust_remote_code: bool = option(default=False, help="Run the code of a model on the Hub.")
    num_threads: int | None = option(None, "CPU threads of torch.")

    def __post_init__(self):
        def refuse(name, remedy):
            raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}")

        for name in ("limit", "max_new_tokens", "num_samples", "timeout", "num_threads"):
            if (value := getattr(self, name)) is not None and value <= 0:
                refuse(name, "use a positive number.")
        if self.backend not in ("hf", "vllm"):
            refuse("backend", "use hf or vllm.")
        if self.dataset_path is not None and self.task not in ("gsm8k", "humaneval"):
            refuse("dataset_path", f"{self.task} has its own problems; leave it out.")
        if not (self.batch_size.isdigit() and int(self.batch_size)) and self.batch_size.split(":")[0] != "auto":
            refuse("batch_size", "use a positive number or auto.")
        if self.task != "humaneval" and self.num_samples != 1:
            refuse("num_samples", "only HumanEval is scored with several samples; leave it out.")
        if self.temperature < 0:
            refuse("temperature", "use 0 or more.")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "use a number above 0, up to 1.")
        if self.temperature == 0 and (self.num_samples > 1 or self.top_p < 1):
            refuse("temperature", "greedy samples are all alike; set it above 0, or leave num_samples and top_p out.")
        parts = self.k.split(",")
        if not all(part.isdigit() and 1 <= int(part) <= self.num_samples for part in parts):
            refuse("k", f"give numbers from 1 to num_samples={self.num_samples}, such as 1,10.")
        try:
            self.template_args = json.loads(self.chat_template_args)
        except ValueError as error:
            refuse("chat_template_args", f"use JSON ({error}).")
        self.attempts = sorted({int(part) for part in parts})
        if self.output_path is None:
            is_folder = Path(self.model_name_or_path).is_dir()
            folder = Path(self.model_name_or_path) if is_folder else Path("results", self.model_name_or_path)
            self.output_path = str(folder / "eval")


def choose_task(args):
    """Returns the task for the harness: one of our task files with the options of the command, or a name."""
    from hf_phibalance.evaluation import harness

    if args.task not in OWN_TASKS:
        return args.task
    fields = {} if args.num_fewshot is None else {"num_fewshot": args.num_fewshot}
    if args.task == "humaneval":
        fields["repeats"] = args.num_samples
        fields["metric_list"] = [
            {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in args.attempts
        ]
        fields["process_results"] = partial(
            harness.score_humaneval_samples, k=args.attempts, timeout=args.timeout, unsafe=args.unsafe
        )
    return harness.load_task(args.task, args.dataset_path, **fields)


def model_arguments(args):
    """Returns the arguments of the harness's model, for transformers or vLLM."""
    from lm_eval.utils import simple_parse_args_string

    own = {
        "pretrained": args.model_name_or_path,
        "dtype": args.dtype,
        "revision": args.revision,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.template_args:
        own["chat_template_args"] = args.template_args
    if args.backend == "hf":
        chosen = {"attn_implementation": args.attn_implementation, "device": args.device}
        own |= {name: value for name, value in chosen.items() if value is not None}
    return own | simple_parse_args_string(args.model_args)


def evaluate(args, options):
    """Runs the harness. Returns its results, and with transformers the expert load."""
    import lm_eval

    from hf_phibalance.evaluation.harness import PhiBalanceLM

    if args.backend == "vllm":
        options |= {"model_args": model_arguments(args), "batch_size": args.batch_size}
        return lm_eval.simple_evaluate("vllm", **options), None
    lm = PhiBalanceLM(**model_arguments(args), batch_size=args.batch_size)
    with lm.counting_load():
        return lm_eval.simple_evaluate(lm, **options), lm.expert_load()


def main(args):
    import torch
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from hf_phibalance import evaluation
    from hf_phibalance.evaluation.harness import model_fingerprint

    if args.task == "humaneval":
        evaluation.require_sandbox(args.confirm_run_unsafe_code or None, unsafe=args.unsafe)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    output = Path(args.output_path)
    file = output if output.suffix == ".json" else output / "results.json"  # the harness adds the date to its name
    tracker = EvaluationTracker(output_path=str(file))
    model = model_fingerprint(args.model_name_or_path, backend=args.backend, **model_arguments(args))
    manager = TaskManager(include_defaults=args.task not in OWN_TASKS)
    if args.task not in (*OWN_TASKS, *manager.all_tasks) and not Path(args.task).expanduser().is_file():  # a YAML file
        raise ValueError(
            f"task={args.task!r}: use {', '.join(OWN_TASKS)}, or a task of the harness (`lm-eval ls tasks` lists them)."
        )
    decoding = {} if args.max_new_tokens is None else {"max_gen_toks": args.max_new_tokens}
    if args.temperature > 0:
        decoding |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    options = {
        "tasks": [choose_task(args)],
        "task_manager": manager,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "gen_kwargs": decoding or None,
        "apply_chat_template": args.apply_chat_template,
        "system_instruction": args.system_instruction,
        "torch_random_seed": args.seed,
        "use_cache": str(file.parent / "cache" / model) if args.use_cache else None,
        "confirm_run_unsafe_code": args.confirm_run_unsafe_code or args.task == "humaneval",
        "evaluation_tracker": tracker,
    }
    results, load = evaluate(args, options)
    if results is None:  # this is not the first process
        return None
    samples = results.pop("samples")
    if load is not None:
        results["expert_load"] = load
    if args.task == "humaneval":
        results["isolation"] = "none" if args.unsafe else "bubblewrap"
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    print(make_table(results))
    if load is not None:
        print(
            f"Expert load of {load['completions']} completions: MaxVio {load['max_vio']:.3f}, Gini {load['gini']:.3f}"
        )
    else:
        why = "the model has no routers, or all completions came from the cache"
        print(f"No expert load: {'vLLM does not count it' if args.backend == 'vllm' else why}.", file=sys.stderr)
    print(f"Results and samples: {output}")
    return results


if __name__ == "__main__":
    replace_unprintable()
    # Python looks for modules beside a script first: without this, `import evaluate` would find the script itself
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    from trl import TrlParser

    main(*TrlParser(Arguments).parse_args_and_config())
