"""`recipes/sft.py` from the command line for a few steps: its results folder, and the inputs it takes."""

import importlib
import json
import os

import pytest
from forked import run_script
from matplotlib.image import imread
from paths import ROOT
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
    config = ROOT / "recipes" / "tiny-cpu" / "mixtral.yaml"
    done = run_recipe(
        "--config", config, *SMALL, "--train_problems", 64, "--compare_unbalanced", "true", "--output_dir", folder
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


def test_bad_input_names_the_remedy(recipe, tmp_path):
    with pytest.raises(ValueError, match="set only one of them"):
        recipe.Arguments(compare_unbalanced=True, baseline_dir="x")
    with pytest.raises(FileNotFoundError, match=r"holds none of train\.jsonl"):
        recipe.load_problems(recipe.Arguments(dataset_path=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"lacks metrics\.json and history\.json"):
        Run.load(tmp_path)
    tiny = ["--model_type", "mixtral", "--output_dir", str(tmp_path)]
    for options, message in (
        (["--output_dir", str(tmp_path)], "give one of them"),
        ([*tiny, "--model_name_or_path", "x"], "give one of them"),
        (["--tiny", "--model_name_or_path", "x", "--output_dir", str(tmp_path)], "needs its architecture"),
        ([*tiny, "--use_peft", "--lora_target_modules", "q_proj"], "lora_target_modules: this recipe does not use it"),
        ([*tiny, "--use_peft", "--load_in_4bit"], "quantised training needs a script of its own"),
        ([*tiny, "--router_policy", "lora"], "needs adapters: set use_peft=true"),
        ([*tiny, "--global_batch_size=18", "--per_device_train_batch_size=4"], "no multiple of 4, the rows that 1"),
        ([*tiny[2:], "--model_name_or_path", "x", "--vocab_size", "64"], "vocab_size=64 is for a new model"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.main(*recipe.parse([*options, "--use_cpu", "true", "--bf16", "false"]))
