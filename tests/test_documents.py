"""Pages: every code block runs as printed (here, or in the test that is named here), and what they name exists."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from forked import run_script
from made_records import write_collapse
from paths import ROOT
from tiny import tiny_model

from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


GUIDES = ROOT / "recipes" / "guides"
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "recipes").glob("**/*.md")) if ".nox" not in page.parts),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}

# Tests of blocks by their page and a piece of their text. Those in `integrations` run in environments of nox.
TESTED_ELSEWHERE = {
    ("README.md", "pip install"): ".ci/run",
    ("README.md", "recipes/smollm2-moe/upcycle.py"): "tests/recipes/test_smollm2_moe.py",
    ("README.md", "SFTTrainer"): "tests/test_readme.py",
    ("README.md", "φ-balancing is on"): "tests/test_readme.py",
    ("README.md", "trainer.save_model()"): "tests/test_readme.py",
    ("README.md", "phibalance export out merged"): "tests/test_readme.py",
    ("recipes/guides/TOOLS.md", "PhiBalancePlugin"): "tests/integrations/test_axolotl.py",
    ("recipes/guides/TOOLS.md", "lora_target_parameters"): "tests/integrations/test_axolotl.py",
    ("recipes/guides/TOOLS.md", "swift"): "tests/integrations/test_swift.py",
    ("recipes/guides/TOOLS.md", "llamafactory"): "tests/integrations/test_llamafactory.py",
    ("recipes/guides/TOOLS.md", "phi_balance:\n  coef"): "tests/integrations/test_llamafactory.py",
    ("recipes/guides/UPCYCLING.md", "phb.upcycle"): "tests/models/test_upcycling.py",
    ("recipes/guides/LOOPS.md", "for micro_batches in steps"): "tests/integrations/test_own_loops.py",
    ("recipes/guides/LOOPS.md", "import Accelerator"): "tests/integrations/test_own_loops.py",
    ("recipes/guides/LOOPS.md", "import lightning"): "tests/integrations/test_own_loops.py",
    ("recipes/guides/AUDIT.md", "phb.audit(trainer)"): "tests/diagnosis/test_audit.py",
    ("recipes/guides/AUDIT.md", "accumulation and ranks"): "tests/diagnosis/test_audit.py",
    ("recipes/guides/WATCHING.md", "phb.watch"): "tests/watching/test_guide.py",
    ("recipes/guides/SERVING.md", "vllm.entrypoints"): "tests/integrations/test_vllm.py",
    ("recipes/README.md", "recipes/sft.py"): "tests/recipes/test_recipes.py",
    ("recipes/olmoe-1b-7b/README.md", "recipes/"): "tests/recipes/test_recipes.py",
    ("recipes/small-cpu/README.md", "recipes/sft.py"): "tests/recipes/test_small_recipes.py",
    ("recipes/smollm2-moe/README.md", "pip install"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "export MALLOC"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "recipes/smollm2-moe/upcycle.py"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "phibalance "): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "recipes/sft.py"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "recipes/evaluate.py"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "from transformers"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "def max_element"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/smollm2-moe/README.md", "recipes/render_cards.py"): "tests/recipes/test_smollm2_moe.py",
    ("recipes/tiny-cpu/README.md", "recipes/sft.py"): "tests/recipes/test_recipe_sft.py",
    ("recipes/compare/README.md", "compare.py"): "tests/recipes/test_compare.py",
    ("recipes/compare/FINETUNING.md", "compare.py"): "tests/recipes/test_compare.py",
    ("recipes/compare/REAL.md", "compare.py"): "tests/recipes/test_compare_real.py",
}
HERE = ("recipes/evaluate.py", "phibalance ", "python -c", "python -m pytest", "--- ")
NO_CODE = ("bibtex",)
EVIDENCE = {"compare", "RELIABILITY.md"}  # pages that name files of the versions they were measured with


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks():
    """`(page, code)` of all fenced blocks."""
    for page in PAGES:
        for language, code in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if language not in NO_CODE:
                yield name_of(page), code


def commands(part, folder="recipes/guides/"):
    """Lines that begin with `part` in the blocks of README.md and of the pages in `folder`, each once."""
    pages = [(page, code) for page, code in blocks() if page == "README.md" or page.startswith(folder)]
    lines = [line for page, code in pages if not is_elsewhere(page, code) for line in code.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith(part)))


def is_elsewhere(page, code):
    return any(page == key[0] and key[1] in code for key in TESTED_ELSEWHERE)


def test_every_block_is_run_by_a_test():
    unused = set(TESTED_ELSEWHERE)
    for page, code in blocks():
        found = [key for key in TESTED_ELSEWHERE if key[0] == page and key[1] in code]
        assert found or any(command in code for command in HERE), f"no test runs this block of {page}:\n{code}"
        unused -= set(found)
    assert not unused, "no such block"
    for test in TESTED_ELSEWHERE.values():
        assert (ROOT / test).is_file(), test


# ---------------------------------------------------------------------- names, links and length


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h)).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if not EVIDENCE & {*page.parts}], ids=name_of)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:hf_phibalance|recipes|tests|model_cards)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<![\w/])recipes/[\w./-]+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=name_of)
def test_a_guide_opens_with_its_reader_and_is_short(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("For ")
    assert len(lines) <= 150 or page.name == "MISTAKES.md"
    assert f"guides/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8"), "README does not link it"


def test_every_room_is_in_the_table():
    text = (GUIDES / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for folder in (ROOT / "hf_phibalance").iterdir():
        assert not (folder / "__init__.py").is_file() or f"`hf_phibalance/{folder.name}/`" in text, folder.name


@pytest.mark.slow
def test_table_of_families_is_current():
    path = ROOT / "recipes" / "families_table.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.updated(text) == text, "run: python recipes/families_table.py"
    assert "`mixtral`" in script.table()


# ---------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name: a model with a selection bias, the records of its training, data, and sources."""
    import torch

    import hf_phibalance as phb

    folder = tmp_path_factory.mktemp("place")
    splits = make_splits(40, 0, 8)
    text = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in splits["train"]]
    tokenizer = train_tokenizer([*text, (ROOT / "recipes" / "sft.py").read_text()], vocab_size=400)
    model = phb.patch(
        tiny_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=2048), {"bias_coef": 0.01}
    )
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: 0.01 * torch.arange(8.0) for name in balancer.layer_names})
    for name in ("results/tiny-cpu/mixtral", "results/mine", "results/x"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_collapse(folder / "results/mine")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "results/dense")
    tokenizer.save_pretrained(folder / "results/dense")
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = splits[split]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("recipes", "hf_phibalance"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "src").symlink_to(ROOT / "hf_phibalance" / "maths")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("phibalance "))
def test_commands_of_the_package(line, place):
    (place / "phibalance.py").write_text("from hf_phibalance.cli import main\n\nraise SystemExit(main())\n")
    words = shlex.split(line)
    extra = ["--max_loss_increase", "100"] if words[1] == "export" else []  # of a model that has learnt nothing
    done = run_script(place / "phibalance.py", *words[1:], *extra, cwd=place, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    for option, file in pairwise(words):
        assert option not in ("--html", "--json") or (place / file).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands("python recipes/evaluate.py") if "vllm" not in line])
def test_evaluations(line, place):
    """The Hub's datasets are out of reach in the tests: local files stand for them."""
    words = shlex.split(line)
    problem = {"task_id": "x", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1)\n"}
    (place / "HumanEval.jsonl").write_text(json.dumps(problem) + "\n")
    data = place / ("HumanEval.jsonl" if "humaneval" in words else "gsm8k")
    short = ["--dataset_path", data, "--max_new_tokens", 8, "--limit", 2, "--num_threads", 1]
    done = run_script(ROOT / "recipes" / "evaluate.py", *words[2:], *short, cwd=place, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|phb_" in done.stdout and list((place / "results/x/eval").glob("results_*.json"))


# ---------------------------------------------------------------------- the worked changes of CONTRIBUTING.md


TRY = """
import sys
import pytest
sys.path[:0] = ["", "tests/helpers"]
import hf_phibalance
assert hf_phibalance.__file__.startswith(sys.argv[1]), hf_phibalance.__file__
from hf_phibalance.routers.families import TRAITS
from tiny import tiny_batch, tiny_model
assert TRAITS["MyMoeTopKRouter"].scoring == "sigmoid"
model = hf_phibalance.patch(tiny_model("mixtral"), {"potential": "l4"}).train()
model(**tiny_batch(model)).loss.backward()
hf_phibalance.get_balancer(model).step()
found = hf_phibalance.get_balancer(model).metrics()
assert abs(found["busiest"] - found["max_vio"] - 1) < 1e-5
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/maths/test_potentials.py", "-k", "l4"]))
"""


@pytest.mark.slow
def test_worked_changes(tmp_path):
    """Applied to a copy, the changes work together: a potential passes its tests, a trait is there, a metric is logged."""
    for name in ("hf_phibalance", "tests/maths", "tests/helpers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    diffs = [code for page, code in blocks() if page.endswith("CONTRIBUTING.md") and code.startswith("--- ")]
    assert len(diffs) == 6
    for diff in diffs:
        head, *lines = diff.splitlines()
        path = tmp_path / head.removeprefix("--- ")
        before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        source = path.read_text(encoding="utf-8")
        assert source.count(f"\n{before}\n") == 1, f"{head}: {before!r} is not there"
        path.write_text(source.replace(f"\n{before}\n", f"\n{after}\n"), encoding="utf-8")
    (tmp_path / "attempt.py").write_text(TRY)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "attempt.py", str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout


@pytest.mark.slow
def test_commands_that_show_a_family(capsys):
    """The tests that the second one selects run with the rest of the suite."""
    show, run = map(shlex.split, commands("python -"))
    exec(show[2], {})
    assert "qwen3_moe" in capsys.readouterr().out
    assert (ROOT / run[3]).is_file() and run[4:] == ["-k", "qwen3_moe"]
