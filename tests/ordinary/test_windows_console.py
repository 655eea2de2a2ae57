"""On a console with code page 1252, missing characters (φ, ✓) are replaced, and nothing depends on them."""

import ast
import io
import json
import runpy
import sys

import pytest
from forked import call
from made_records import write_collapse
from made_texts import make_tokenizer, words
from paths import ROOT, sources
from tiny import tiny_model

import hf_phibalance as phb
from hf_phibalance import cli


pytestmark = pytest.mark.slow


SCRIPTS = [path for path in sources("recipes") if '"__main__"' in path.read_text(encoding="utf-8")]


def on_code_page_1252(run, *arguments):
    """Runs `run(*arguments)` with the streams of such a console, and prints characters that it lacks."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        strict = "strict" if name == "stdout" else "backslashreplace"
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w"), "cp1252", strict, write_through=True))
    code = run(*arguments)
    print("φ ✓ ∑")
    sys.exit(code)


def recipe(script, *options):
    sys.argv = [script, *options]
    sys.path.insert(0, str(ROOT / "recipes"))
    runpy.run_path(script, run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    phb.patch(tiny_model("deepseek_v3"), {"coef": 0.01, "bias_coef": 0.1}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "a.txt").write_text(words(200))
    return folder


@pytest.mark.parametrize("command", ["inspect", "doctor", "export"])
@pytest.mark.parametrize("to", ["file", "-"])
def test_each_command_ends_well_and_writes_its_json(folder, tmp_path, command, to):
    out = tmp_path / "out.json" if to == "file" else to
    options = {"inspect": ["--texts", f"ß={folder / 'a.txt'}"], "export": [str(tmp_path / "plain"), "--no_check"]}
    arguments = [command, str(folder), *options.get(command, ()), "--json", str(out)]
    done = call(on_code_page_1252, cli.main, arguments)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("? ? ?\n", "")
    report = json.loads(out.read_text(encoding="utf-8") if to == "file" else shown)
    assert report and "? ? ?" in done.stdout and (to == "-" or shown)
    if command == "doctor":
        assert any("φ-balancing" in check["finding"] for check in report["checks"])


def test_watch_ends_well(tmp_path):
    write_collapse(tmp_path)
    done = call(on_code_page_1252, cli.main, ["watch", str(tmp_path), "--once"])
    assert done.returncode == 0, done.stderr
    assert "layer 1" in done.stdout and "dead experts" in done.stdout and "? ? ?" in done.stdout


def test_a_recipe_ends_well(tmp_path):
    config = ROOT / "recipes" / "olmoe-1b-7b" / "gsm8k" / "phibalance.yaml"
    words = ("--config", str(config), "--tiny", "--output_dir", str(tmp_path))
    done = call(on_code_page_1252, recipe, str(ROOT / "recipes" / "sft.py"), *words)
    assert done.returncode == 0, done.stderr
    assert "Training with ?-balanced routers" in done.stdout and (tmp_path / "README.md").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_begins_so(script):
    begin = next(node for node in ast.parse(script.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    assert "replace_unprintable" in ast.unparse(begin.body[0])
