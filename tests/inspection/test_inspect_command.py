"""The command `phibalance inspect`: what it writes, and how it refuses."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_texts import domains_of, make_tokenizer, words
from paths import DATA
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hf_phibalance import cli
from hf_phibalance.files import parse_json, printable
from hf_phibalance.inspection import inspect_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("qwen3_moe").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_command(tmp_path, saved, texts, capsys):
    out = tmp_path / "new" / "report"
    words = ["inspect", saved, "--texts", *texts[0], "--field", "body", "--seq_len", "12"]
    assert cli.main([*words, "--json", f"{out}.json", "--html", f"{out}.html"]) == 0
    shown = capsys.readouterr().out
    for text in ("MaxVio", "low", "high", "layer 1", "layer 2", "qwen3_moe"):
        assert text in shown
    written = json.loads(Path(f"{out}.json").read_text())
    expected = inspect_model(tiny_model("qwen3_moe"), make_tokenizer(), domains_of(texts), seq_len=12)
    expected.model["name"] = saved
    assert "transformers" in written.pop("versions")
    assert written == json.loads(json.dumps(expected.to_dict(top=5)))
    assert written["layers"][0]["counts"]["low"] == expected.layers[0].counts[0].tolist()
    page = Path(f"{out}.html").read_text()
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)  # nothing from outside the file
    assert page.count('<svg class="heat"') == 3 + 2 and page.count('<svg class="lines"') == 4
    assert "--texts" in page and str(tmp_path) not in page
    figures = written["layers"][0]["figures"]["overall"]
    assert f"{figures['gini']:.3f}" in page and f"{figures['gini']:.3f}" in shown


def test_json_to_standard_output_is_json_alone(saved, texts, capsys):
    assert cli.main(["inspect", saved, "--texts", *texts[0], "--field", "body", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["domains"]["low"]["tokens"] == 89
    assert "MaxVio" in captured.err


def test_command_on_an_adapter(tmp_path, saved, texts, capsys):
    """The tokenizer is the base model's, and the adapter's change of the router shows."""
    base = AutoModelForCausalLM.from_pretrained(saved)
    model = get_peft_model(base, LoraConfig(target_parameters=["mlp.gate.weight"], r=4, lora_alpha=64))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    words = ["--texts", *texts[0], "--field", "body", "--json", "-"]
    counts = {}
    for name in (saved, str(tmp_path / "adapter")):
        assert cli.main(["inspect", name, *words]) == 0
        counts[name] = json.loads(capsys.readouterr().out)["layers"][0]["counts"]["overall"]
    live = inspect_model(model, make_tokenizer(), domains_of(texts))
    assert counts[str(tmp_path / "adapter")] == live.layers[0].counts.sum(0).tolist() != counts[saved]


def test_one_domain_has_no_specialisation(tmp_path, saved, texts, capsys):
    assert cli.main(["inspect", saved, "--texts", texts[0][1], "--json", "-", "--html", str(tmp_path / "a.html")]) == 0
    captured = capsys.readouterr()
    written = json.loads(captured.out)
    assert set(written["summary"]) == {"overall"} and written["specialists"] == {}
    assert written["layers"][0]["specialisation"] is None
    assert "Specialisation" not in (tmp_path / "a.html").read_text() and "domain uses" not in captured.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["x=missing.txt"], "no such file"),
        (["x={tmp}/empty"], "no file in that folder ends in"),
        (["x={tmp}/*.none"], "nothing matches it as a glob"),
        (["=a.txt"], "write name=path"),
        (["x="], "write name=path"),
        (["overall=a.txt"], "not 'overall'"),
        (["x={tmp}/rows.jsonl"], r"first row: say by `--field`.*\['a', 'b'\]"),
        (["x={tmp}/rows.jsonl", "--field", "y=a"], "for no domain"),
        (["x={tmp}/rows.jsonl", "--field", "wrong"], r"'wrong'.*\['a', 'b'\]"),
        (["x={tmp}/chats.jsonl"], "no chat template.*--tokenizer"),
        (["x={tmp}/a.txt", "--batch_size", "0"], "`--batch_size` is 0"),
        (["x={tmp}/a.txt", "--html", "{tmp}"], "is a folder"),
        (["x={tmp}/a.txt", "--json", "{tmp}/a.txt/b.json"], "a.txt"),
        (["x={tmp}/a.txt", "--seq_len", "65"], "at most 64"),
        (["x={tmp}/none.txt"], "no text in domain x"),
    ],
)
def test_bad_input_is_explained(tmp_path, saved, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("w3 w4")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"a": "w3", "b": "w4"}\n')
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "w3"}]}\n')
    assert cli.main(["inspect", saved, "--texts", *(word.format(tmp=tmp_path) for word in words)]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err.splitlines()[-1]), captured.err
    assert not captured.out


ODD = ("caf\udce9", "[/b]", "\x1b[31mred\n\t", "<b>&</b>", "|`*_", "x" * 300, "noise floor", "\u202eabc", "😀", "—")


def test_a_report_is_written_whatever_the_labels_are(tmp_path, saved):
    """In a process of its own, whose terminal knows ASCII only; names of files and of domains that are no Unicode, or markup."""
    for index in range(len(ODD)):
        (tmp_path / f"{index}.txt").write_text(words(30, seed=index))
    texts = [f"{name}={tmp_path}/{index}.txt" for index, name in enumerate(ODD)]
    (tmp_path / "caf\udce9 [i].txt").write_text(words(30, seed=99))
    out = str(tmp_path / "[/b] caf\udce9")
    command = [
        "inspect",
        saved,
        "--texts",
        *texts,
        f"{tmp_path}/caf\udce9 [i].txt",
        "--json",
        f"{out}.json",
        "--html",
        f"{out}.html",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_phibalance.cli", *command], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    written = parse_json(Path(f"{out}.json").read_bytes())  # which refuses half characters
    shown = [printable(name) for name in (*ODD, "caf\udce9 [i]")]
    assert list(written["domains"]) == shown and all(len(written["layers"][0]["counts"][name]) == 8 for name in shown)
    page = Path(f"{out}.html").read_text(encoding="utf-8")
    assert all(html.escape(name) in page for name in shown) and "<b>&" not in page
    assert b"\x1b" not in done.stdout and rb"caf\udce9" in done.stdout and b"HTML report in" in done.stdout
    assert max(float(width) for width in re.findall(r'style="width:(\d+)px"', page)) < 2000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_report_that_cannot_be_written_does_not_take_the_others_with_it(tmp_path, saved, texts, capsys):
    words = ["inspect", saved, "--texts", texts[0][1], "--json", "/dev/full", "--html", str(tmp_path / "a.html")]
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err and "MaxVio" in captured.out
    assert "MaxVio" in (tmp_path / "a.html").read_text()


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from hf_phibalance import cli\n"
        "cli.make_parser().parse_args(['inspect', 'm', '--texts', 'a=b'])\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)\n"
        "cli.main(['inspect', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--ignore_phi_balance" in done.stdout


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="the real data is not here")
def test_real_text(tmp_path, capsys):
    """A tiny model with random weights still tells GSM8K from Python sources: their tokens differ."""
    from hf_phibalance.models import train_tokenizer

    with (DATA / "gsm8k" / "test.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(40)]
    source = Path(json.__file__).parent
    tokenizer = train_tokenizer([row["question"] for row in rows] + [(source / "decoder.py").read_text()], 400)
    tiny_model("mixtral", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"math={DATA}/gsm8k/test.jsonl", f"prose={DATA}/wikitext2/valid.txt", f"code={source}"]
    words = ["--max_tokens", "3000", "--seq_len", "64", "--json", "-"]
    assert cli.main(["inspect", str(tmp_path / "model"), "--texts", *texts, *words]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [read["tokens"] for read in written["domains"].values()] == [3000] * 3
    for layer in written["layers"]:
        assert sum(layer["counts"]["overall"]) == 3 * 3000 * 2
        assert layer["figures"]["code"]["design_effect"] > 1.5  # real text is not independent tokens
        assert not layer["specialisation"]["noise"]
        assert 0.002 < layer["specialisation"]["mutual_information"] < layer["specialisation"]["plug_in"] < 1.0
    assert all(1 <= len(entries) <= 5 for entries in written["specialists"].values())
