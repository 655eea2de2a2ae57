"""`recipes/sft.py` from the command line for a few steps: its results folder, and the inputs it takes."""

import importlib
import json
import os
import shutil

import pytest
from forked import run_script
from matplotlib.image import imread
from paths import ROOT
from safetensors.torch import load_file
from task_rows import write

import hf_phibalance as phb
from hf_phibalance.hub import Run
from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow

SMALL = [
    *("--max_steps", "6", "--logging_steps", "1", "--eval_steps", "3", "--per_device_train_batch_size", "4"),
    *("--validation_problems", "4", "--test_problems", "4", "--max_new_tokens", "8", "--learning_rate", "1e-3"),
    *("--bf16", "false", "--save_strategy", "no", "--report_to", "none"),
]


CONFIG = ROOT / "recipes" / "tiny-cpu" / "mixtral.yaml"


def run_recipe(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return run_script(ROOT / "recipes" / "sft.py", *options, env=environment)


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        yield importlib.import_module("sft")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "tiny"
    done = run_recipe(
        "--config", CONFIG, *SMALL, "--train_problems", 64, "--compare_unbalanced", "true", "--output_dir", folder
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_results_folder_is_complete(results):
    folder, done = results
    names = (
        "README.md config.json model.safetensors phi_balance.state tokenizer.json metrics.json history.json "
        "loads.png curves.png unbalanced/metrics.json unbalanced/history.json"
    )
    assert not [name for name in names.split() if not (folder / name).is_file()]
    assert "exact match, trained" in done.stdout and "MaxVio" in done.stdout
    run, baseline = Run.load(folder), Run.load(folder / "unbalanced")
    assert run.balance.coef > 0 and baseline.balance is None
    for one in (run, baseline):
        assert [entry["step"] for entry in one.loads] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in one.series("moe/max_vio")] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in one.series("eval_exact_match")] == [3, 6]
        for load in one.loads[-1]["load"].values():
            assert sum(load) == pytest.approx(len(load), rel=1e-4)
    assert phb.get_balancer(phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=True)).steps == 6


def test_pictures_show_something(results):
    for name in ("loads.png", "curves.png"):
        picture = imread(results[0] / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05
        assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).round(2)}) > 20


def test_model_card_says_what_was_measured(results):
    from huggingface_hub import ModelCard

    folder, _ = results
    card, summary = ModelCard.load(folder / "README.md"), json.loads((folder / "metrics.json").read_text())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results[0].metric_value == round(summary["exact_match"]["trained"], 4)
    assert f"{summary['held_out']['moe/max_vio']:.3f}" in card.text
    assert "|  | unbalanced | φ-balanced |" in card.text
    assert "phi_balance=True" in card.text and "loads.png" in card.text and "## Limits" in card.text


def test_trained_model_and_real_files(results, tmp_path):
    data = tmp_path / "problems"
    for split, rows in make_splits(train=40, test=8, seed=9).items():
        write(data / f"{split}.jsonl", rows)
    done = run_recipe(
        "--model_name_or_path", results[0], "--dataset_path", data, *SMALL, "--balance", "false",
        "--baseline_dir", results[0], "--dtype", "float32", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert summary["balance"] is None
    assert summary["problems"] == {"train": 36, "validation": 4, "test": 4}
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_two_runs_resume_each_from_its_own_checkpoint(tmp_path):
    folder = tmp_path / "tiny"
    options = [
        *("--config", CONFIG, *SMALL, "--train_problems", 64),
        *("--save_strategy", "steps", "--save_steps", 3, "--eval_strategy", "no", "--output_dir", folder),
        *("--compare_unbalanced", "true", "--resume_from_checkpoint", "true"),
    ]

    def losses():
        done = run_recipe(*options)
        assert done.returncode == 0, done.stderr
        return [Run.load(one).series("loss") for one in (folder, folder / "unbalanced")]

    first = losses()
    for path in (folder / "checkpoint-3", folder / "checkpoint-6", folder / "unbalanced" / "checkpoint-6"):
        shutil.rmtree(path)  # what a job leaves that is killed in the unbalanced half
    again = losses()
    assert again == first and first[0] != first[1]
    assert [entry["step"] for entry in Run.load(folder / "unbalanced").loads] == [4, 5, 6]


def test_an_adapter_is_trained_further(results, tmp_path):
    options = [*SMALL, "--train_problems", 64, "--dtype", "float32", "--use_cpu", "true", "--eval_strategy", "no"]
    for model, folder, adapters in (
        (results[0], "first", ["--use_peft", "true", "--router_policy", "lora"]),
        (tmp_path / "first", "second", []),
    ):
        done = run_recipe("--model_name_or_path", model, *options, *adapters, "--output_dir", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and not any(second[name].equal(first[name]) for name in first)


def test_one_file_is_split(recipe, tmp_path):
    rows = make_splits(train=30)["train"]
    file = write(tmp_path / "problems.jsonl", rows)
    args = recipe.Arguments(dataset_path=file, validation_problems=4, test_problems=6)
    splits = recipe.load_problems(args)
    assert {split: len(part) for split, part in splits.items()} == {"train": 20, "validation": 4, "test": 6}
    assert len({row["question"] for part in splits.values() for row in part}) == 30
    with pytest.raises(ValueError, match="none is left to train on"):
        recipe.load_problems(recipe.Arguments(dataset_path=file, validation_problems=24, test_problems=6))


def test_a_miniature_writes_beside_the_results(recipe):
    file = ROOT / "recipes" / "olmoe-1b-7b" / "gsm8k" / "none.yaml"
    config = ["--config", str(file), "--use_cpu", "true", "--bf16", "false"]
    real = "results/olmoe-1b-7b/gsm8k/none"
    for options, folder in (([], real), (["--tiny"], f"{real}-tiny"), (["--tiny", "--output_dir=x"], "x")):
        assert recipe.parse([*config, *options])[2].output_dir == folder


@pytest.mark.parametrize("form", [["--tiny"], ["--tiny=true"], ["--tiny", "true"], "yaml", ["--tiny", "false"]])
def test_every_form_of_tiny_sets_all_of_it(form, recipe, tmp_path):
    file = ROOT / "recipes" / "olmoe-1b-7b" / "gsm8k" / "none.yaml"
    if form == "yaml":
        file, form = tmp_path / "none.yaml", []
        file.write_text((ROOT / "recipes" / "olmoe-1b-7b" / "gsm8k" / "none.yaml").read_text() + "\ntiny: true\n")
    args, _, training_args, _ = recipe.parse(["--config", str(file), "--use_cpu", "true", "--bf16", "false", *form])
    is_tiny = "false" not in form
    assert args.tiny == (args.dataset_path == "toy") == (training_args.max_steps == 2) == is_tiny
    assert training_args.output_dir.endswith("-tiny") == is_tiny


def test_resuming_on_the_command_line_is_as_in_yaml(recipe):
    given = {"true": True, "True": True, "false": False, "x/checkpoint-1": "x/checkpoint-1"}
    options = ["--model_type", "mixtral", "--output_dir", "x", "--use_cpu", "true", "--bf16", "false"]
    for text, value in given.items():
        assert recipe.parse([*options, "--resume_from_checkpoint", text])[2].resume_from_checkpoint == value
    assert recipe.parse(options)[2].resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("train_problems", "0", "train_problems=0: the recipe needs at least 1"),
        ("validation_problems", "0", "validation_problems=0: the recipe needs at least 1"),
        ("test_problems", "-1", "test_problems=-1: the recipe needs at least 1"),
        ("model_config", "abc", "model_config='abc' is no mapping"),
        ("model_config", "[1]", r"model_config='\[1\]' is no mapping"),
        ("potential_kwargs", "abc", "potential_kwargs='abc' is no mapping"),
    ],
)
def test_a_bad_value_is_named_with_its_option(option, value, message, recipe):
    with pytest.raises(ValueError, match=message):
        recipe.parse([f"--{option}", value, "--use_cpu", "true", "--bf16", "false"])


def test_bad_input_names_the_remedy(recipe, tmp_path):
    with pytest.raises(ValueError, match="set only one of them"):
        recipe.Arguments(compare_unbalanced=True, baseline_dir="x")
    with pytest.raises(FileNotFoundError, match=r"holds none of train\.jsonl"):
        recipe.load_problems(recipe.Arguments(dataset_path=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"lacks metrics\.json and history\.json"):
        Run.load(tmp_path)
    tiny = ["--model_type", "mixtral", "--output_dir", str(tmp_path)]
    short = ["--config", str(CONFIG), *SMALL, "--train_problems", "8", *tiny]
    for options, message in (
        (["--output_dir", str(tmp_path)], "give one of them"),
        ([*tiny, "--model_name_or_path", "x"], "give one of them"),
        (["--tiny", "--model_name_or_path", "x", "--output_dir", str(tmp_path)], "needs its architecture"),
        ([*tiny, "--use_peft", "--lora_target_modules", "q_proj"], "lora_target_modules: this recipe does not use it"),
        ([*tiny, "--use_peft", "--load_in_4bit"], "quantised training needs a script of its own"),
        ([*tiny, "--router_policy", "lora"], "needs adapters: set use_peft=true"),
        ([*tiny, "--global_batch_size=18", "--per_device_train_batch_size=4"], "no multiple of 4, the rows that 1"),
        ([*tiny[2:], "--model_name_or_path", "x", "--vocab_size", "64"], "vocab_size=64 is for a new model"),
        (
            [*short, "--compare_unbalanced", "--resume_from_checkpoint", "x/checkpoint-4"],
            "compare_unbalanced trains two: set resume_from_checkpoint: true",
        ),
        ([*short, "--max_length", "8"], "max_length=8 is too short"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.main(*recipe.parse([*options, "--use_cpu", "true", "--bf16", "false"]))
