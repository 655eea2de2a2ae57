"""
Recipes in two processes of `accelerate launch` train as one process with the same global batches, from the start and resumed.

Only the order of sums differs, in fp32: losses and duals agree to 1e-5, weights to 1e-4. One step of training moves them a
hundred times as far.
"""

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from paths import HELPERS, ROOT
from safetensors.torch import load_file
from transformers import set_seed

import hf_phibalance as phb
from hf_phibalance.hub import pictures


pytestmark = pytest.mark.slow


CONFIGS = ROOT / "recipes" / "accelerate_configs"
STEPS = 3
TRAINING = [
    *("--max_steps", STEPS, "--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "no"),
    *("--learning_rate", 0.5, "--adam_epsilon", 1.0, "--lr_scheduler_type", "constant"),  # smooth in the gradient
    *("--coef", 2.0, "--ema_rate", 0.7),
    *("--validation_problems", 4, "--test_problems", 4),
]
RECIPES = {
    "peft": ["--config", "recipes/mixtral-8x7b/gsm8k/phibalance.yaml"],
    "full": [
        "--config",
        "recipes/olmoe-1b-7b/gsm8k/phibalance.yaml",
        *("--use_peft", "false", "--router_policy", "full"),
    ],
}
LOSS_BOUND = DUALS_BOUND = 1e-5
WEIGHTS_BOUND = 1e-4

LAUNCHES = {
    "ddp": ["--config_file", CONFIGS / "cpu_2_processes.yaml"],
    "fsdp2": ["--config_file", CONFIGS / "fsdp2.yaml", "--num_processes", 2, "--mixed_precision", "no"],
    "zero3": ["--config_file", CONFIGS / "zero3.yaml", "--num_processes", 2, "--mixed_precision", "no"],
    "zero2": ["--use_deepspeed", "--zero_stage", 2, "--num_processes", 2, "--mixed_precision", "no"],
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
KINDS = ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)]
CASES = [
    *itertools.product(("ddp", "fsdp2"), RECIPES),
    *(pytest.param(kind, name, marks=needs_deepspeed) for kind in ("zero2", "zero3") for name in RECIPES),
]


def launch(kind, *runs):
    """Runs the recipe in two processes with each list of options, one after another."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if kind.startswith("zero"):
        environment |= {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHES[kind], "--main_process_port", 0]
    use_cpu = ["--use_cpu", "true" if kind == "ddp" else "false"]  # see launched.py
    command += [HELPERS / "launched.py", *(json.dumps([*run, *use_cpu]) for run in runs)]
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def recipe():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        for name in ("plot_loads", "plot_curves"):
            patch.setattr(pictures, name, lambda *args, **kwargs: None)
        torch.set_num_threads(1)
        yield importlib.import_module("sft")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def options(recipe, tmp_path_factory):
    """The options of `--tiny`, but with a miniature model that is loaded from a folder."""
    import miniature

    start = tmp_path_factory.mktemp("start")
    for name, (_, path, *_) in RECIPES.items():
        args, balance, training_args, model_args = recipe.parse(["--config", str(ROOT / path), "--tiny"])
        set_seed(0)
        model, tokenizer = recipe.load_model(
            args, balance, training_args, model_args, recipe.load_problems(args)["train"]
        )
        phb.unpatch(model).save_pretrained(start / name)
        tokenizer.save_pretrained(start / name)

    def make(name, folder, *more):
        _, path, *changes = RECIPES[name]
        given = ["--config", ROOT / path, *changes, *miniature.OPTIONS, *TRAINING]
        return [*map(str, [*given, "--model_name_or_path", start / name, "--output_dir", folder, *more])]

    return make


@pytest.fixture(scope="module")
def one_process(recipe, options, tmp_path_factory):
    """Results of each recipe in this process."""
    folders = {name: tmp_path_factory.mktemp("one") / name for name in RECIPES}
    for name, folder in folders.items():
        recipe.main(*recipe.parse(options(name, folder)))
    return folders


@pytest.fixture(scope="module")
def launched(options, tmp_path_factory):
    """Runs each recipe in two processes of `kind`, whole and resumed after its first step; once."""
    made = {}

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            runs = [options(name, root / name) for name in RECIPES]
            for name in RECIPES:
                again = root / f"{name}-resumed"
                runs.append(options(name, again, "--resume_from_checkpoint", root / name / "checkpoint-1"))
            made[kind] = root, launch(kind, *runs)
        root, done = made[kind]
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return root, done.stdout

    return make


def losses(folder):
    log = json.loads((folder / "history.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def weights(folder):
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def distance(left, right):
    assert left.keys() == right.keys() and left
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def assert_same_training(folder, reference, first_step=1):
    left, right = losses(folder), losses(reference)
    assert sorted(right) == list(range(1, STEPS + 1))
    for step in range(first_step, STEPS + 1):
        assert left[step] == pytest.approx(right[step], abs=LOSS_BOUND)
        duals = [load_file(run / f"checkpoint-{step}" / "phi_balance.state") for run in (folder, reference)]
        assert distance(*duals) < DUALS_BOUND, step
    assert distance(weights(folder), weights(reference)) < WEIGHTS_BOUND
    # not the held-out loss: the trainer takes the mean of the batches' means
    held_out = [json.loads((run / "metrics.json").read_text())["held_out"] for run in (folder, reference)]
    assert all(held_out[0][key] == pytest.approx(held_out[1][key], abs=1e-4) for key in ("moe/max_vio", "moe/gini"))


@pytest.mark.parametrize("name", RECIPES)
def test_reference_moves(one_process, name):
    folder = one_process[name]
    first, last = (folder / f"checkpoint-{step}" for step in (1, STEPS))
    assert distance(weights(first), weights(last)) > 100 * WEIGHTS_BOUND
    duals = [load_file(step / "phi_balance.state") for step in (first, last)]
    assert distance(*duals) > 100 * DUALS_BOUND
    assert abs(losses(folder)[1] - losses(folder)[STEPS]) > 100 * LOSS_BOUND


@pytest.mark.parametrize("kind, name", CASES)
def test_two_processes_train_as_one(kind, name, launched, one_process):
    root, _ = launched(kind)
    assert_same_training(root / name, one_process[name])


@pytest.mark.parametrize("kind, name", CASES)
def test_resumes_in_two_processes(kind, name, launched, one_process):
    root, _ = launched(kind)
    assert not (root / f"{name}-resumed" / "checkpoint-1").exists()
    assert_same_training(root / f"{name}-resumed", one_process[name], first_step=2)


@pytest.mark.parametrize("name", RECIPES)
def test_one_process_resumes_what_two_began(name, launched, one_process, recipe, options, tmp_path):
    root, _ = launched("ddp")
    recipe.main(*recipe.parse(options(name, tmp_path, "--resume_from_checkpoint", root / name / "checkpoint-1")))
    assert_same_training(tmp_path, one_process[name], first_step=2)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_words_come_from_the_main_process(kind, launched):
    root, out = launched(kind)
    names = [name for name in RECIPES if (root / name).exists()]
    assert out.count("Training with φ-balanced routers") == out.count("Results in ") == 2 * len(names)
    assert out.count("No exact match, since the weights are sharded") == (0 if kind == "ddp" else 2 * len(names))
    for name in names:
        summary = json.loads((root / name / "metrics.json").read_text())
        trained = summary["exact_match"]["trained"]
        assert trained is None if kind != "ddp" else 0 <= trained <= 1
