"""The command `phibalance inspect`: what it writes, and how it refuses."""

import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_texts import domains_of, make_tokenizer, words
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hf_phibalance import cli
from hf_phibalance.files import parse_json, printable
from hf_phibalance.inspection import inspect_model


pytestmark = pytest.mark.slow


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
    shown, page = capsys.readouterr().out, Path(f"{out}.html").read_text()
    assert all(text in shown for text in ("MaxVio", "low", "high", "layer 1", "layer 2", "qwen3_moe"))
    written = json.loads(Path(f"{out}.json").read_text())
    expected = inspect_model(tiny_model("qwen3_moe"), make_tokenizer(), domains_of(texts), seq_len=12)
    expected.model["name"] = saved
    assert "transformers" in written.pop("versions")
    assert written == json.loads(json.dumps(expected.to_dict(top=5)))
    assert "--texts" in page and str(tmp_path) not in page
    gini = f"{written['layers'][0]['figures']['overall']['gini']:.3f}"
    assert gini in page and gini in shown


def test_an_adapter_counts_and_json_is_alone_on_standard_output(tmp_path, saved, texts, capsys):
    """The tokenizer is the base model's, and the adapter's change of the router shows."""
    base = AutoModelForCausalLM.from_pretrained(saved)
    model = get_peft_model(base, LoraConfig(target_parameters=["mlp.gate.weight"], r=4, lora_alpha=64))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    counts = []
    for name in (saved, str(tmp_path / "adapter")):
        assert cli.main(["inspect", name, "--texts", *texts[0], "--field", "body", "--json", "-"]) == 0
        captured = capsys.readouterr()
        counts.append(json.loads(captured.out)["layers"][0]["counts"]["overall"])
        assert "MaxVio" in captured.err
    live = inspect_model(model, make_tokenizer(), domains_of(texts))
    assert counts[1] == live.layers[0].counts.sum(0).tolist() != counts[0]


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
        (["overall=a.txt"], "than 'overall'"),
        (["x={tmp}/rows.jsonl"], r"first row: say by `--field`.*\['a', 'b'\]"),
        (["x={tmp}/rows.jsonl", "--field", "y=a"], "for no domain"),
        (["x={tmp}/rows.jsonl", "--field", "wrong"], r"'wrong'.*\['a', 'b'\]"),
        (["x={tmp}/chats.jsonl"], "no chat template.*--tokenizer"),
        (["x={tmp}/a.txt", "--batch_size", "0"], "`--batch_size` is 0"),
        (["x={tmp}/a.txt", "--html", "{tmp}"], "is a folder"),
        (["x={tmp}/a.txt", "--html", "{tmp}/r", "--json", "{tmp}/r"], "`--json` and `--html` are both"),
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


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "some/where"])
@pytest.mark.parametrize("command", [["inspect"], ["doctor"], ["export", "plain"]])
def test_a_missing_model_is_named(name, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a.txt").write_text("w3")
    words = [command[0], name, *command[1:], "--texts", str(tmp_path / "a.txt")]
    assert cli.main(words) == (2 if command == ["doctor"] else 1)
    error = capsys.readouterr().err
    assert f"there is no folder '{name}', and the Hub has no such model" in error and "tokenizer" not in error


ODD = ("caf\udce9", "[/b]", "\x1b[31mred\n\t", "<b>&</b>", "|`*_", "x" * 300, "noise floor", "\u202eabc", "😀", "—")


def test_a_report_is_written_whatever_the_labels_are(tmp_path, saved, monkeypatch):
    """Files and domains with names that are no Unicode, or markup, in a terminal that knows ASCII only."""
    for index, _ in enumerate(ODD):
        (tmp_path / f"{index}.txt").write_text(words(30, seed=index))
    (tmp_path / "caf\udce9 [i].txt").write_text(words(30, seed=99))
    texts = [*(f"{name}={tmp_path}/{index}.txt" for index, name in enumerate(ODD)), f"{tmp_path}/caf\udce9 [i].txt"]
    out, terminal = str(tmp_path / "[/b] caf\udce9"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert cli.main(["inspect", saved, "--texts", *texts, "--json", f"{out}.json", "--html", f"{out}.html"]) == 0
    sys.stdout.flush()
    written = parse_json(Path(f"{out}.json").read_bytes())  # which refuses half characters
    shown = [printable(name) for name in (*ODD, "caf\udce9 [i]")]
    assert list(written["domains"]) == shown and all(len(written["layers"][0]["counts"][name]) == 8 for name in shown)
    page = Path(f"{out}.html").read_text(encoding="utf-8")
    assert all(html.escape(name) in page for name in shown) and "<b>&" not in page
    printed = terminal.getvalue()
    assert b"\x1b" not in printed and rb"caf\udce9" in printed and b"HTML report in" in printed


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
    assert done.returncode == 0 and "--ignore_phi_balance" in done.stdout, done.stderr
