"""The command `phibalance doctor`: what it prints and writes, and its exit status."""

import json

import pytest
import torch
from made_texts import make_tokenizer, words
from peft import get_peft_model
from tiny import tiny_model

import hf_phibalance as phb
from hf_phibalance import cli


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a tiny model: as it is, and saved while balanced by a bias that a plain load loses."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("qwen3_moe")
    model.save_pretrained(folder / "plain")
    phb.patch(model, {"coef": 0.3, "bias_coef": 0.1}).save_pretrained(folder / "balanced")
    for name in ("plain", "balanced"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(words(90))
    return str(tmp_path / "a.txt")


def test_a_sound_model(saved, text, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    words = [
        "doctor",
        f"{saved}/plain",
        "--texts",
        text,
        "--seq_len",
        "16",
        "--batch_size",
        "2",
        "--accumulation",
        "3",
    ]
    assert cli.main([*words, "--strict", "--json", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("φ-balance doctor", "3 micro-batches of 2 rows", "0.01 received of 0.01 declared", "All well"):
        assert part in shown, shown
    report = json.loads(out.read_text())
    assert report["status"] == "ok" and abs(report["coefficient"]["ratio"] - 1) < 1e-4
    assert "90 of 96 positions count" in next(c["finding"] for c in report["checks"] if c["name"] == "attention mask")
    assert {check["status"] for check in report["checks"]} == {"ok"} and "torch" in report["versions"]


def test_warnings_count_only_if_strict(saved, capsys):
    """The configuration is the saved one where no option says otherwise; JSON alone goes to the standard output."""
    words = ["doctor", f"{saved}/balanced", "--coef", "0.2", "--json", "-"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["status"] == "warning" and report["coefficient"]["declared"] == 0.2
    assert report["model"]["config"]["bias_coef"] == 0.1
    assert "warning, selection bias" in captured.err and "read the remedies" in captured.err
    assert cli.main([*words, "--strict"]) == 1


def test_a_damaged_state_is_a_problem(saved, tmp_path, capsys):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in (saved / "balanced").iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "phi_balance.state":
            content[-3] ^= 1
        (folder / file.name).write_bytes(content)
    assert cli.main(["doctor", str(folder)]) == 2
    shown = capsys.readouterr().out
    assert "problem, state file" in shown and "Not fit to train" in shown
    assert cli.main(["doctor", str(folder), "--json", "-"]) == 2
    assert json.loads(capsys.readouterr().out)["model"]["config"]["coef"] == 0.3  # the saved configuration is kept


@pytest.mark.parametrize(
    "value, status, said",
    [
        (False, 0, "All well"),
        ([], 2, "`phi_balance` in {folder}/config.json must be"),
        ({"coef": 0.2}, 0, "start anew"),
    ],
    ids=str,
)
def test_what_a_config_says_without_a_state(saved, tmp_path, capsys, value, status, said):
    for file in (saved / "plain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"phi_balance": value}))
    assert cli.main(["doctor", str(tmp_path)]) == status
    captured = capsys.readouterr()
    assert said.format(folder=tmp_path) in " ".join((captured.out + captured.err).split())


def test_lora(saved, capsys):
    """With frozen routers a warning, with trained ones none; made problems where no texts are given."""
    reports = {}
    for router in ("frozen", "lora"):
        words = ["doctor", f"{saved}/plain", "--lora", f"router={router}", "targets=attention", "r=2", "--json", "-"]
        assert cli.main(words) == 0
        reports[router] = json.loads(capsys.readouterr().out)
    assert reports["frozen"]["status"] == "warning" and reports["lora"]["status"] == "ok"
    assert all(len(report["coefficient"]["by_router"]) == 2 for report in reports.values())
    assert all(abs(report["coefficient"]["ratio"] - 1) < 1e-4 for report in reports.values())


@pytest.mark.parametrize("router", ["lora", "full", "frozen"])
def test_an_adapter_is_examined_as_it_would_be_trained(saved, tmp_path, capsys, router):
    model = phb.AutoModelForCausalLM.from_pretrained(saved / "plain", phi_balance=True)
    get_peft_model(model, phb.lora_config(model, router=router, targets="attention")).save_pretrained(tmp_path)
    assert cli.main(["doctor", str(tmp_path), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = next(check for check in report["checks"] if check["name"] == "routers that learn")
    if router == "frozen":
        assert found["status"] == "warning" and "--lora router=lora" in found["remedy"]
    else:
        assert report["status"] == "ok" and ("in full" if router == "full" else "by LoRA") in found["finding"], report
    assert abs(report["coefficient"]["ratio"] - 1) < 1e-4


def test_a_model_without_tokenizer(tmp_path, capsys):
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert cli.main(["doctor", str(tmp_path), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "made tokens" in report["measured"] and report["status"] == "warning"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch_size", "0"], "`--batch_size` is 0"),
        (["--lora", "router"], "`--lora` 'router'"),
        (["--coef", "-1"], "`coef`"),
        (["--texts", "missing.txt"], "no such file"),
        (["--json", "."], "is a folder"),
    ],
)
def test_bad_input_is_explained(saved, capsys, words, message):
    assert cli.main(["doctor", f"{saved}/plain", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_model_that_is_not_there(capsys):
    assert cli.main(["doctor", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
