"""The command `phibalance doctor`: its table, its JSON, and its exit status."""

import json
import shutil

import pytest
import torch
from made_texts import make_tokenizer, words
from peft import get_peft_model
from tiny import tiny_model

import hf_phibalance as phb
from hf_phibalance import cli


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a tiny model: plain, and balanced by a bias that a plain load loses."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("qwen3_moe")
    model.save_pretrained(folder / "plain")
    phb.patch(model, {"coef": 0.3, "bias_coef": 0.1}).save_pretrained(folder / "balanced")
    for name in ("plain", "balanced"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def doctor(capsys):
    """`doctor(folder, *options)`: the exit status, the report as JSON, and the table that was printed."""

    def run(folder, *options):
        status = cli.main(["doctor", str(folder), *options, "--json", "-"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err

    return run


def check(report, name):
    return next(check for check in report["checks"] if check["name"] == name)


def test_a_sound_model(saved, tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "new" / "report.json"
    text.write_text(words(90))
    options = ["--texts", str(text), "--seq_len", "16", "--batch_size", "2", "--accumulation", "3"]
    assert cli.main(["doctor", f"{saved}/plain", *options, "--strict", "--json", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("φ-balance doctor", "3 micro-batches of 2 rows", "0.01 received of 0.01 declared", "All well"):
        assert part in shown, shown
    report = json.loads(out.read_text())
    assert report["status"] == "ok" and abs(report["coefficient"]["ratio"] - 1) < 1e-4
    assert "90 of 96 positions count" in check(report, "attention mask")["finding"]
    assert {check["status"] for check in report["checks"]} == {"ok"} and "torch" in report["versions"]


@pytest.mark.slow
def test_warnings_count_only_if_strict(saved, doctor):
    """The configuration is the saved one unless an option says otherwise. With `--json -` the table goes to stderr."""
    status, report, shown = doctor(saved / "balanced", "--coef", "0.2")
    assert status == 0 and report["status"] == "warning" and report["coefficient"]["declared"] == 0.2
    assert report["model"]["config"]["bias_coef"] == 0.1
    assert "warning, selection bias" in shown and "read the remedies" in shown
    assert doctor(saved / "balanced", "--strict")[0] == 1


def test_the_built_in_loss(saved, tmp_path, doctor):
    """`--stock` measures the model's own loss: switched off as saved, exact if it is on. Balancing is not loaded."""
    status, report, shown = doctor(saved / "balanced", "--stock")
    assert status == 0 and report["status"] == "warning" and report["received"] == 0 and report["declared"] == 0.001
    assert "Auxiliary loss doctor" in shown and "warning, switched off" in shown
    tiny_model("qwen3_moe", output_router_logits=True).save_pretrained(tmp_path)
    options = ("--accumulation", "3", "--tokenizer", f"{saved}/plain", "--lora", "router=lora")
    status, report, shown = doctor(tmp_path, "--stock", *options)
    assert status == 0 and abs(report["ratio"] - 1) < 1e-3 and "3 micro-batches" in report["measured"]
    assert "of 0.001 declared, ratio 1.0000" in " ".join(shown.split())


def test_a_damaged_state_is_a_problem(saved, tmp_path, doctor):
    shutil.copytree(saved / "balanced", tmp_path / "damaged")
    path = tmp_path / "damaged" / "phi_balance.state"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    status, report, shown = doctor(tmp_path / "damaged")
    assert status == 2 and "problem, state file" in shown and "Not fit to train" in shown
    assert report["model"]["config"]["coef"] == 0.3  # the saved configuration is kept


@pytest.mark.slow
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
    shutil.copytree(saved / "plain", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"phi_balance": value}))
    assert cli.main(["doctor", str(tmp_path)]) == status
    captured = capsys.readouterr()
    assert said.format(folder=tmp_path) in " ".join((captured.out + captured.err).split())


@pytest.mark.slow
@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("router", ["lora", "full", "frozen"])
def test_an_adapter_is_examined_as_it_would_be_trained(saved, tmp_path, doctor, router, is_saved):
    """One that `--lora` makes, and one that was saved. Frozen routers are a warning."""
    if is_saved:
        model = phb.AutoModelForCausalLM.from_pretrained(saved / "plain", phi_balance=True)
        get_peft_model(model, phb.lora_config(model, router=router, targets="attention")).save_pretrained(tmp_path)
        status, report, _ = doctor(tmp_path)
    else:
        status, report, _ = doctor(saved / "plain", "--lora", f"router={router}", "targets=attention", "r=2")
    found = check(report, "routers that learn")
    assert status == 0 and abs(report["coefficient"]["ratio"] - 1) < 1e-4
    if router == "frozen":
        assert found["status"] == "warning" and "--lora router=lora" in found["remedy"]
    else:
        assert report["status"] == "ok" and ("in full" if router == "full" else "by LoRA") in found["finding"], report


def test_a_model_without_tokenizer(tmp_path, doctor):
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path)
    status, report, _ = doctor(tmp_path)
    assert status == 0 and "made tokens" in report["measured"] and report["status"] == "warning"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch_size", "0"], "`--batch_size` is 0"),
        (["--lora", "router"], "`--lora` 'router'"),
        (["--coef", "-1"], "`coef`"),
        (["--stock", "--coef", "0.1"], "`--coef` is for balancing"),
        (["--texts", "missing.txt"], "no such file"),
        (
            ["--texts", __file__, "--accumulation", "3", "--batch_size", "9999"],
            "fill only 1 micro-batches of 9999 rows",
        ),
        (["--json", "."], "is a folder"),
    ],
)
def test_bad_input_is_explained(saved, capsys, options, message):
    assert cli.main(["doctor", f"{saved}/plain", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_model_that_is_not_there(capsys):
    assert cli.main(["doctor", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
