"""`recipes/evaluate.py`: its results, resuming after an interruption, several processes, and refusals."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from evaluated import biased_mixtral, completed_functions
from forked import run_script
from paths import ROOT
from task_rows import write

from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow

SCRIPT = ROOT / "recipes" / "evaluate.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Mixtral with a selection bias, and problems of HumanEval's form."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = biased_mixtral()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "HumanEval.jsonl", completed_functions()[0])
    return folder


def options(folder, output, **other):
    small = {"task": "made", "limit": 10, "batch_size": "4", "max_new_tokens": 12, "num_threads": 1}
    return {"model_name_or_path": str(folder / "model"), "output_path": str(output), **small, **other}


def run(recipe, folder, output, **other):
    return recipe.main(recipe.Arguments(**options(folder, output, **other)))


def written(output):
    """The harness's files: its results, and the completions by problem."""
    (results,) = output.glob("results_*.json")
    (samples,) = output.glob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text()), {row["doc_id"]: row["resps"][0] for row in rows}


@pytest.fixture(scope="module")
def whole(recipe, folder, tmp_path_factory):
    """Results and completions of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    run(recipe, folder, output)
    return written(output)


def test_results_are_the_harness_s_and_the_expert_load(recipe, folder, whole, capsys, tmp_path):
    results, completions = whole
    assert set(results["results"]["phb_made"]) >= {"strict_match,none", "flexible_extract,none"}
    assert results["n-samples"]["phb_made"] == {"original": 256, "effective": 10} and len(completions) == 10
    assert results["expert_load"]["completions"] == 10 and results["expert_load"]["max_vio"] > 0
    run(recipe, folder, tmp_path, limit=2)
    shown = capsys.readouterr().out
    assert "strict_match" in shown and "Expert load of 2 completions: MaxVio" in shown and str(tmp_path) in shown


def test_right_answers_and_programs_score_everything(recipe, folder, tmp_path, monkeypatch):
    from hf_phibalance.evaluation.harness import PhiBalanceLM

    problems, solutions = completed_functions()
    answers = {row["question"]: f" {row['answer']}" for row in make_splits(256, 0, 256)["test"]}
    answers |= {problem["prompt"]: solution for problem, solution in zip(problems, solutions)}

    def answer(self, requests, disable_tqdm=False):
        return [next(text for key, text in answers.items() if key in request.args[0]) for request in requests]

    monkeypatch.setattr(PhiBalanceLM, "generate_until", answer)
    made = run(recipe, folder, tmp_path / "made")
    assert made["results"]["phb_made"]["strict_match,none"] == 1.0
    code = {"task": "humaneval", "dataset_path": str(folder / "HumanEval.jsonl"), "limit": None}
    found = run(recipe, folder, tmp_path / "code", **code, confirm_run_unsafe_code=True)
    assert found["results"]["phb_humaneval"]["pass@1,none"] == 1.0 and found["isolation"] == "bubblewrap"
    answers[problems[0]["prompt"]] = "    return 0\n"
    sampled = {"num_samples": 4, "temperature": 1.0, "k": "1,2", "confirm_run_unsafe_code": True}
    found = run(recipe, folder, tmp_path / "sampled", **code, **sampled)
    for name in ("pass@1,none", "pass@2,none"):
        assert found["results"]["phb_humaneval"][name] == pytest.approx(2 / 3)


KILLED = """
import importlib.util, json, os, signal, sys

spec = importlib.util.spec_from_file_location("recipe_evaluate", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

from hf_phibalance.evaluation.harness import PhiBalanceLM
generate, calls = PhiBalanceLM._model_generate, []

def generate_and_die(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, *args, **kwargs)

PhiBalanceLM._model_generate = generate_and_die
recipe.main(recipe.Arguments(**json.loads(sys.argv[2])))
"""


def test_killed_and_resumed_is_as_uninterrupted(folder, tmp_path, whole):
    own = options(folder, tmp_path / "out")
    (tmp_path / "killed.py").write_text(KILLED)
    killed = run_script(tmp_path / "killed.py", SCRIPT, json.dumps(own), env=ENVIRONMENT)
    assert killed.returncode == -9, killed.stderr
    command = [word for name, value in own.items() for word in (f"--{name}", value)]
    done = run_script(SCRIPT, *command, env=ENVIRONMENT)  # as typed, where Python looks for modules beside the script
    assert done.returncode == 0, done.stderr
    results, completions = written(tmp_path / "out")
    assert results["results"] == whole[0]["results"] and completions == whole[1]
    assert results["expert_load"]["completions"] == 2  # of the last batch; the others were cached


def test_two_processes_share_the_problems(folder, tmp_path, whole):
    command = [word for name, value in options(folder, tmp_path).items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    subprocess.run([*launch, "--rdzv_backend", "c10d", str(SCRIPT), *command], check=True, env=ENVIRONMENT)
    results, completions = written(tmp_path)
    assert results["results"] == whole[0]["results"] and completions == whole[1]
    assert results["expert_load"] == pytest.approx(whole[0]["expert_load"], abs=1e-5)


def test_a_chat_template_and_its_arguments(recipe, folder, tmp_path):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="chat_template"):
        run(recipe, folder, tmp_path / "none", apply_chat_template=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mood }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chat = {"apply_chat_template": True, "chat_template_args": '{"mood": "calm"}', "limit": 1}
    run(recipe, folder, tmp_path / "chat", **chat, model_args=f"tokenizer={tmp_path / 'tokenizer'}")
    (samples,) = (tmp_path / "chat").glob("samples_*.jsonl")
    prompt = json.loads(samples.read_text())["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<user>Question:") and prompt.endswith("calm")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": 0}, "limit=0: use a positive number"),
        ({"num_samples": 2}, "only HumanEval"),
        ({"task": "humaneval", "num_samples": 2}, "greedy samples are all alike"),
        ({"top_p": 0.9}, "greedy samples are all alike"),
        ({"temperature": -1.0}, "use 0 or more"),
        ({"task": "humaneval", "k": "1,10"}, r"k='1,10': give numbers from 1 to num_samples=1"),
        ({"dataset_path": "x"}, "made has its own problems"),
        ({"batch_size": "0"}, "use a positive number or auto"),
        ({"backend": "jax"}, "use hf or vllm"),
        ({"chat_template_args": "{"}, "chat_template_args='{': use JSON"),
    ],
)
def test_arguments_that_cannot_be_met(recipe, folder, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        recipe.Arguments(**options(folder, tmp_path, **wrong))


def test_a_task_that_is_not_there(recipe, folder, tmp_path):
    with pytest.raises(ValueError, match=r"task='nosuch': use gsm8k, humaneval, made, or a task of the harness"):
        run(recipe, folder, tmp_path, task="nosuch")


def test_code_is_not_run_without_permission(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(RuntimeError, match="HF_ALLOW_CODE_EVAL"):
        run(recipe, folder, tmp_path / "out", task="humaneval", dataset_path=str(folder / "HumanEval.jsonl"))
    assert not list(tmp_path.iterdir())
