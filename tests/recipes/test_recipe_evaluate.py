"""`recipes/evaluate.py`: what it generates, scores and writes, and that an interruption changes nothing."""

import importlib.machinery
import importlib.util
import json
import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from evaluated import FIELDS, Scripted, biased_mixtral
from forked import run_script
from paths import ROOT

import hf_phibalance as phb
from hf_phibalance.evaluation import load_problems, make_prompts
from hf_phibalance.maths import max_vio
from hf_phibalance.models import build_model
from hf_phibalance.tasks import load_rows, make_splits


SCRIPT = ROOT / "recipes" / "evaluate.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PROGRAMS = {
    "double": ("    return 2 * x\n", "    assert candidate(3) == 6\n"),
    "is_even": (
        "    if x % 2:\n        return False\n    return True\n",
        "    assert candidate(4) and not candidate(5)\n",
    ),
    "digits": ("    return len(str(x))\n", "    assert candidate(123) == 3\n"),
}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Mixtral with a selection bias in its sidecar, and made-up problems of both tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = biased_mixtral()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {name}(x):\n    """ Made up.\n    """\n',
            "entry_point": name,
            "canonical_solution": solution,
            "test": f"def check(candidate):\n{test}",
        }
        for number, (name, (solution, test)) in enumerate(PROGRAMS.items())
    ]
    (folder / "HumanEval.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return folder


def options(folder, task="gsm8k", **other):
    """Arguments of a small evaluation, by name."""
    small = {"dataset_path": "toy", "num_fewshot": 0, "limit": 10} if task == "gsm8k" else {}
    small |= {"dataset_path": str(folder / "HumanEval.jsonl"), "confirm_run_unsafe_code": True} if not small else {}
    own = {"model_name_or_path": str(folder / "model"), "task": task, "batch_size": 4, "max_new_tokens": 12}
    return {**own, "output_path": str(folder / "results.json"), "num_threads": 1, **small, **other}


def run(recipe, *args, **other):
    return recipe.main(recipe.Arguments(**options(*args, **other)))


def without_times(path):
    """A result without what tells one run from another: its duration, its day, and the command with its file name."""
    run = ("seconds", "date", "command")
    return {key: value for key, value in json.loads(Path(path).read_text()).items() if key not in run}


# ---------------------------------------------------------------------- scores


def test_right_answers_score_everything(recipe, folder, tmp_path, monkeypatch):
    rows = make_splits(0, 0, 10)["test"]
    answers = {f"Question: {row['question']}\nAnswer:": f" {row['answer']}\n\nQuestion: Mia has 99" for row in rows}
    monkeypatch.setattr(recipe, "load_model", lambda args, tokenizer: Scripted(tokenizer, answers))
    found = run(recipe, folder, output_path=tmp_path / "out.json", max_new_tokens=200, balance=False)
    assert found["metrics"] == {"strict_match": 1.0, "flexible_extract": 1.0}
    assert found["ended"] == {"eos": 0, "stop": 10, "length": 0}
    assert [one["completion"] for one in found["completions"]] == [f" {row['answer']}\n\n" for row in rows]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["completions"][0]["gold"] == rows[0]["answer"].split("#### ")[1]
    assert written["settings"]["stops"] == ["Question:", "</s>", "<|im_end|>"] and "balance" not in written

    wrong = dict.fromkeys(answers, " It is 12.\n#### 7x")
    wrong[next(iter(wrong))] = f" #### 0{rows[0]['answer'].split('#### ')[1]}"
    wrong[list(wrong)[1]] = f" It is {rows[1]['answer'].split('#### ')[1]}"
    monkeypatch.setattr(recipe, "load_model", lambda args, tokenizer: Scripted(tokenizer, wrong))
    found = run(recipe, folder, output_path=tmp_path / "wrong.json", max_new_tokens=200, balance=False)
    golds = [row["answer"].split("#### ")[1] for row in rows]
    expected = {"strict_match": golds[2:].count("7") / 10, "flexible_extract": (1 + golds[2:].count("7")) / 10}
    assert found["metrics"] == pytest.approx(expected)
    assert found["ended"]["eos"] == 10


def test_right_programs_pass(recipe, folder, tmp_path, monkeypatch):
    problems = load_rows("humaneval", str(folder / "HumanEval.jsonl"), "test")
    answers = {row["prompt"]: row["canonical_solution"] + "\ndef wrong(:\n    pass" for row in problems}
    answers[problems[2]["prompt"]] = "    return 0\n"
    monkeypatch.setattr(recipe, "load_model", lambda args, tokenizer: Scripted(tokenizer, answers))
    found = run(recipe, folder, "humaneval", output_path=tmp_path / "out.json", max_new_tokens=200, balance=False)
    assert found["metrics"] == {"pass@1": pytest.approx(2 / 3)}
    assert [(one["id"], one["passed"]) for one in found["completions"]] == [
        ("HumanEval/0", True),
        ("HumanEval/1", True),
        ("HumanEval/2", False),
    ]


# ---------------------------------------------------------------------- models


def test_batch_size_changes_nothing(recipe, folder, tmp_path):
    alone = run(recipe, folder, batch_size=1, output_path=tmp_path / "1.json", dtype="float32")
    batched = run(recipe, folder, batch_size=4, output_path=tmp_path / "4.json", dtype="float32")
    completions = [[one["completion"] for one in found["completions"]] for found in (alone, batched)]
    assert completions[0] == completions[1] and len(set(completions[0])) > 1
    assert alone["balance"] == pytest.approx(batched["balance"], abs=1e-4)


def test_completions_are_those_of_the_model_with_its_bias(recipe, folder, tmp_path):
    found = run(recipe, folder, output_path=tmp_path / "out.json", limit=3, num_fewshot=1)
    tokenizer = recipe.load_tokenizer(recipe.Arguments(**options(folder)))
    texts = make_prompts("gsm8k", *load_problems("gsm8k", "toy", num_fewshot=1, limit=3), num_fewshot=1)
    expected = {}
    for flag in (None, False):
        model = phb.AutoModelForCausalLM.from_pretrained(folder / "model", phi_balance=flag)
        expected[flag] = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            tokens = model.generate(ids, do_sample=False, max_new_tokens=12)
            expected[flag].append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    assert [one["completion"] for one in found["completions"]] == expected[None] != expected[False]

    # naive: every text alone, the experts that are chosen by probability and bias
    model = phb.AutoModelForCausalLM.from_pretrained(folder / "model", phi_balance=False)
    biased = phb.AutoModelForCausalLM.from_pretrained(folder / "model")
    bias = list(phb.get_balancer(biased).biases().values())
    loads = torch.zeros(2, 4)
    chosen = {}
    gates = [module for name, module in biased.named_modules() if name.endswith("mlp.gate")]
    for layer, module in enumerate(gates):
        module.register_forward_hook(lambda _, __, output, layer=layer: chosen.__setitem__(layer, output))
    for text, one in zip(texts, found["completions"]):
        ids = tokenizer(text)["input_ids"] + tokenizer(one["completion"])["input_ids"]
        with torch.no_grad():
            biased(input_ids=torch.tensor([ids]), use_cache=False)
        for layer in range(2):
            loads[layer] += torch.bincount(chosen[layer][2].flatten(), minlength=4)
    assert len(bias) == 2 and float(bias[0].abs().max()) == 0.5
    assert found["balance"]["max_vio"] == pytest.approx(max_vio(loads).mean().item(), abs=1e-5)


def test_adapter_with_its_bias(recipe, folder, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = phb.AutoModelForCausalLM.from_pretrained(folder / "model", phi_balance=False)
    model.save_pretrained(tmp_path / "base")
    recipe.load_tokenizer(recipe.Arguments(**options(folder))).save_pretrained(tmp_path / "base")
    model = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.02, "track": "load"})
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: torch.tensor([0.0, 0.5, -0.5, 0.0]) for name in balancer.layer_names})
    adapted.save_pretrained(tmp_path / "adapter")
    balancer.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()

    found = run(recipe, folder, model_name_or_path=str(tmp_path / "adapter"), output_path=tmp_path / "out.json")
    args = recipe.Arguments(**options(folder, model_name_or_path=str(tmp_path / "adapter")))
    tokenizer = recipe.load_tokenizer(args)  # of the base model
    texts = make_prompts("gsm8k", *load_problems("gsm8k", "toy", limit=10))
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = adapted.eval().generate(input_ids=ids, do_sample=False, max_new_tokens=12)
        expected.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    assert [one["completion"] for one in found["completions"]] == expected


def test_dense_models_have_no_expert_load(recipe, folder, tmp_path, capsys):
    fields = {key: value for key, value in FIELDS.items() if "experts" not in key}
    tokenizer = recipe.load_tokenizer(recipe.Arguments(**options(folder)))
    build_model("llama", fields, tokenizer).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    model = str(tmp_path / "dense")
    found = run(recipe, folder, model_name_or_path=model, output_path=tmp_path / "out.json", limit=2)
    assert found["balance"] is None and "No expert load" in capsys.readouterr().err


# ---------------------------------------------------------------------- interruptions

KILLED = """
import importlib.util, json, os, signal, sys

from hf_phibalance.evaluation import CompletionStore

spec = importlib.util.spec_from_file_location("recipe_evaluate", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
add = CompletionStore.add

def add_and_die(self, number, completions):
    add(self, number, completions)
    if number == 1:
        with self.path.open("a") as file:
            file.write('{"batch": 2, "completions": [{"index"')
        os.kill(os.getpid(), signal.SIGKILL)

CompletionStore.add = add_and_die
recipe.main(recipe.Arguments(**json.loads(sys.argv[2])))
"""


def test_killed_and_resumed_is_as_uninterrupted(recipe, folder, tmp_path, monkeypatch, capsys):
    sampled = {"temperature": 1.0, "top_p": 0.9, "limit": 14}  # each batch has its seed, so this holds for samples too
    whole = run(recipe, folder, output_path=str(tmp_path / "whole.json"), **sampled)
    assert len({one["completion"] for one in whole["completions"]}) == 14
    own = options(folder, output_path=str(tmp_path / "killed.json"), **sampled)
    (tmp_path / "killed.py").write_text(KILLED)
    killed = run_script(tmp_path / "killed.py", SCRIPT, json.dumps(own), env=ENVIRONMENT)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "killed.json").exists()
    lines = (tmp_path / "killed.completions.jsonl").read_text()
    assert lines.count("\n") == 3 and not lines.endswith("\n")

    # as the command line does it, where Python looks for modules beside the script first
    command = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert str(SCRIPT.parent) not in sys.path
    assert Path(importlib.machinery.PathFinder.find_spec("evaluate").origin) != SCRIPT  # but the library
    assert without_times(tmp_path / "killed.json") == without_times(tmp_path / "whole.json")
    assert json.loads((tmp_path / "killed.json").read_text())["seconds"]["completions_from_an_earlier_run"] == 8
    assert "strict_match" in capsys.readouterr().out
    # the command in the result is the one that was typed
    written = recipe.make_parser().parse_args_and_config(
        shlex.split(json.loads((tmp_path / "killed.json").read_text())["command"])[2:]
    )
    assert written == recipe.make_parser().parse_args_and_config([str(word) for word in command])


def test_complete_files_are_scored_again_without_the_model(recipe, folder, tmp_path, monkeypatch):
    first = run(recipe, folder, output_path=tmp_path / "out.json", limit=3)
    (tmp_path / "out.json").unlink()
    monkeypatch.setattr(recipe, "load_model", None)
    again = run(recipe, folder, output_path=tmp_path / "out.json", limit=3)
    assert {**first, "seconds": None} == {**again, "seconds": None}


def test_other_settings_are_refused(recipe, folder, tmp_path):
    output = tmp_path / "out.json"
    run(recipe, folder, output_path=output, limit=2)
    with pytest.raises(ValueError, match=r"other settings: max_new_tokens=12 \(now 13\).*--overwrite"):
        run(recipe, folder, output_path=output, limit=2, max_new_tokens=13)
    assert run(recipe, folder, output_path=output, limit=2, max_new_tokens=13, overwrite=True)["problems"] == 2
    assert json.loads(output.read_text())["settings"]["max_new_tokens"] == 13
    (tmp_path / "out.completions.jsonl").write_text("something else\n")
    with pytest.raises(ValueError, match="not a file of completions"):
        run(recipe, folder, output_path=output, limit=2)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("mbpp", {}, "use gsm8k or humaneval"),
        ("gsm8k", {"limit": 0}, "limit=0: use a positive number"),
        ("gsm8k", {"num_samples": 2}, "one answer per problem"),
        ("gsm8k", {"k": "1"}, "only HumanEval has pass@k"),
        ("gsm8k", {"top_p": 0.9}, "does nothing to greedy"),
        ("gsm8k", {"temperature": -1.0}, "temperature >= 0"),
        ("humaneval", {"num_fewshot": 1}, "HumanEval has no shots"),
        ("humaneval", {"num_samples": 2}, "set temperature above 0"),
        ("humaneval", {"k": "1,10"}, r"k='1,10': give numbers from 1 to num_samples=1"),
        ("humaneval", {"dataset_path": "toy"}, "are for gsm8k"),
    ],
)
def test_arguments_that_cannot_be_met(recipe, folder, task, wrong, message):
    with pytest.raises(ValueError, match=message):
        recipe.Arguments(**options(folder, task, **wrong))


def test_the_tasks_have_their_own_defaults(recipe, folder):
    gsm8k, humaneval = (
        recipe.Arguments(**options(folder, task, num_fewshot=None, max_new_tokens=None))
        for task in ("gsm8k", "humaneval")
    )
    assert (gsm8k.num_fewshot, gsm8k.max_new_tokens) == (5, 256)
    assert (humaneval.num_fewshot, humaneval.max_new_tokens) == (0, 1024)


def test_code_is_not_run_without_permission(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(recipe, "load_model", None)
    with pytest.raises(RuntimeError, match="HF_ALLOW_CODE_EVAL"):
        run(recipe, folder, "humaneval", confirm_run_unsafe_code=False, output_path=tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_prompts_beyond_the_context(recipe, folder, tmp_path):
    with pytest.raises(ValueError, match=r"10 of 10 prompts, the longest of \d+ tokens.*context of 512 tokens"):
        run(recipe, folder, output_path=tmp_path / "out.json", num_fewshot=7)
    with pytest.raises(ValueError, match="leaves nothing for the prompt"):
        run(recipe, folder, output_path=tmp_path / "out2.json", max_new_tokens=512)
    cut = run(
        recipe, folder, output_path=tmp_path / "cut.json", num_fewshot=7, limit=2, max_new_tokens=4,
        long_prompts="truncate", balance=False,
    )  # fmt: skip
    assert cut["prompts_cut"] == 2 and len(cut["completions"]) == 2


def test_missing_data_is_named(recipe, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(recipe, folder, dataset_path=str(tmp_path / "nothing.jsonl"))
    one = tmp_path / "problems.jsonl"
    one.write_text(json.dumps(make_splits(0, 0, 1)["test"][0]) + "\n")
    with pytest.raises(ValueError, match="no training rows to draw shots from"):
        run(recipe, folder, dataset_path=str(one), num_fewshot=1)
    one.write_text("")
    with pytest.raises(ValueError, match="nothing is left of the 0 rows"):
        run(recipe, folder, dataset_path=str(one))


def test_chats_need_a_template(recipe, folder, tmp_path):
    with pytest.raises(ValueError, match=r"apply_chat_template=True, but the tokenizer of \S+model has none"):
        run(recipe, folder, apply_chat_template=True, output_path=tmp_path / "out.json")
