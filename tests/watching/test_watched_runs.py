"""Watched trainer runs: the same weights, losses and files as unwatched ones; killed and resumed; trackers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import call
from paths import ROOT
from tiny import tiny_model
from training import TRAINERS, make_trainer, rows
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb
from hf_phibalance.watching import Thresholds, read_records


pytestmark = pytest.mark.slow

OURS = {"moe.jsonl"}


def run(folder, cls, watched, aux=False, **arguments):
    """Trains four steps. Returns the trainer, the log without our keys, and the files of its folder."""
    model = tiny_model("mixtral", **({"output_router_logits": True, "router_aux_loss_coef": 0.5} if aux else {}))
    trainer = make_trainer(model.train(), folder, cls, save_strategy="epoch", **arguments)
    if watched:
        phb.watch(trainer)
    trainer.train()
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    log = [
        {key: value for key, value in entry.items() if not key.startswith("moe/") and key not in times}
        for entry in trainer.state.log_history
    ]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return trainer, log, files


@pytest.mark.parametrize("aux", [False, True], ids=["plain", "aux_loss"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("cls", TRAINERS)
def test_training_and_files_are_those_of_an_unwatched_run(cls, checkpointing, aux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that both runs have the same output_dir
    plain = run(Path("out"), cls, False, aux, gradient_checkpointing=checkpointing)
    Path("out").rename("plain")
    watched = run(Path("out"), cls, True, aux, gradient_checkpointing=checkpointing)
    assert watched[1] == plain[1]  # losses, gradient norms, TRL's own aux_loss
    for (name, now), then in zip(watched[0].model.named_parameters(), plain[0].model.parameters()):
        assert torch.equal(now, then), name
    assert watched[2].keys() == plain[2].keys() | OURS
    states = [name for name in plain[2] if name.endswith("trainer_state.json")]  # these hold the log
    assert {name for name in plain[2] if plain[2][name] != watched[2][name]} <= {*states, *zipped(plain[2])}
    for name in zipped(plain[2]):
        now, then = (torch.load(folder / name, weights_only=False) for folder in (Path("out"), Path("plain")))
        assert str(now) == str(then), name
    row = read_records(Path("out")).rows[0]
    assert row["loss"] == pytest.approx(plain[1][0]["loss"], rel=1e-4)


@pytest.mark.parametrize("cls", TRAINERS)
def test_mixed_precision_keeps_the_forward_of_the_trainer(cls, tmp_path):
    """accelerate wraps `forward.__func__`; TRL's trainer has its own forward below ours."""
    plain, watched = (run(tmp_path / str(on), cls, on, aux=True, bf16=True, use_cpu=True) for on in (False, True))
    assert watched[1] == plain[1]
    assert read_records(tmp_path / "True").rows


def zipped(files):
    """Names of files of torch, which hold times or memory addresses."""
    return [name for name in files if name.endswith((".pt", ".pth", ".bin"))]


def test_evaluation_and_best_model_need_no_state(tmp_path):
    model = tiny_model("mixtral").train()
    trainer = make_trainer(
        model, tmp_path, eval_dataset=rows(4, seed=1), eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True,
    )  # fmt: skip
    phb.watch(trainer)
    trainer.train()
    assert any("eval_moe/max_vio" in entry for entry in trainer.state.log_history)
    assert not list(tmp_path.rglob("phi_balance*"))


def test_a_watched_run_that_resumes_ends_as_one_that_was_not_interrupted(tmp_path):
    whole = make_trainer(tiny_model("mixtral").train(), tmp_path / "whole", save_strategy="epoch")
    phb.watch(whole)
    whole.train()
    first = make_trainer(tiny_model("mixtral").train(), tmp_path / "cut", save_strategy="epoch", num_train_epochs=1)
    phb.watch(first)
    first.train()
    resumed = make_trainer(tiny_model("mixtral").train(), tmp_path / "cut", save_strategy="epoch")
    phb.watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    for (name, now), then in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(now, then), name
    cut, uncut = (read_records(tmp_path / name).rows for name in ("cut", "whole"))
    assert [row["step"] for row in cut] == [1, 2, 3, 4]
    assert [layer["load"] for row in cut for layer in row["layers"].values()] == [
        layer["load"] for row in uncut for layer in row["layers"].values()
    ]


def test_an_alert_is_not_said_again_after_a_resume(tmp_path):
    said = []
    for epochs in (2, 4):
        model = tiny_model("mixtral").train()
        for layer in model.model.layers[:1]:
            layer.mlp.gate.requires_grad_(False)
        trainer = make_trainer(model, tmp_path, save_strategy="epoch", num_train_epochs=epochs)
        watch = phb.watch(trainer, thresholds=Thresholds(steps=2))
        trainer.train(resume_from_checkpoint=epochs == 4)
        said.append([(alert["step"], alert["alert"]["layer"]) for alert in watch.alerts])
    assert said == [[(1, "model.layers.0.mlp.gate")], []]
    assert len(read_records(tmp_path).alerts) == 1


def test_an_alert_stops_the_training_if_asked(tmp_path):
    model = tiny_model("mixtral").train()
    model.model.layers[1].mlp.gate.requires_grad_(False)
    trainer = make_trainer(model, tmp_path, SFTTrainer)
    phb.watch(trainer, on_alert="raise")
    with pytest.raises(phb.RouterAlert, match=r"unmoved_router: router 'model.layers.1.mlp.gate': it is frozen"):
        trainer.train()
    assert trainer.state.global_step == 1 and read_records(tmp_path).alerts[0]["step"] == 1


KILLED = """
import sys
from training import make_trainer, rows
from tiny import tiny_model
import hf_phibalance as phb
kept = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
trainer = make_trainer(tiny_model("mixtral").train(), sys.argv[1], data=rows(64), num_train_epochs=1000, **kept)
before = set(sys.modules)
phb.watch(trainer)
assert not {"wandb", "trackio", "tensorboard", "matplotlib"} & (set(sys.modules) - before)  # none is imported
trainer.train()
"""


def test_a_killed_run_leaves_a_readable_file_and_goes_on(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}", "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, script, out], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while not (out / "moe.jsonl").is_file() or len(read_records(out).rows) < 7:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = [row["step"] for row in read_records(out).rows]
    assert steps == list(range(1, len(steps) + 1))
    last = phb.last_checkpoint(out)
    resumed = make_trainer(
        tiny_model("mixtral").train(), out, data=rows(64), max_steps=int(last.rpartition("-")[2]) + 2
    )
    phb.watch(resumed)
    resumed.train(resume_from_checkpoint=last)
    found = read_records(out)
    assert found.run["step"] == int(last.rpartition("-")[2])
    steps = [row["step"] for row in found.rows]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] == found.run["step"] + 2


# ---------------------------------------------------------------------- trackers


def tracked(folder):
    """A watched run with every tracker, in a process of its own."""
    model = tiny_model("mixtral").train()
    model.model.layers[2].mlp.gate.requires_grad_(False)
    trainer = make_trainer(
        model, folder / "out", report_to=["tensorboard", "trackio", "wandb"], run_name="tiny", project="watch-test",
        trackio_static_space_id=False,
    )  # fmt: skip
    phb.watch(trainer)
    trainer.train()
    import wandb
    from trackio.sqlite_storage import SQLiteStorage

    wandb.finish()
    logs, alerts = SQLiteStorage.get_logs("watch-test", "tiny"), SQLiteStorage.get_alerts("watch-test")
    (folder / "written.json").write_text(json.dumps({"logs": logs, "alerts": alerts}, default=str))


def test_trackers_show_tables_histograms_pictures_and_alerts(tmp_path):
    pytest.importorskip("wandb"), pytest.importorskip("trackio")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"), "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_DIR": str(tmp_path),
    }  # fmt: skip
    done = call(tracked, tmp_path, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (events,) = {path.parent for path in (tmp_path / "tensorboard").rglob("events*")}
    board = accumulators.EventAccumulator(str(events)).Reload()
    loads = read_records(tmp_path / "out").rows[0]["layers"]
    assert board.Tags()["histograms"] == [f"moe/load/layer {index}" for index in range(3)]
    assert board.Histograms("moe/load/layer 0")[0].histogram_value.num == 8
    shown = board.Images("moe/loads")[0]
    assert (shown.height, shown.width) == (3 * 32, 8 * 32)
    images = list(tmp_path.glob("wandb/offline-run-*/files/media/images/moe/*.png"))
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/moe/*.json"))
    assert len(images) == len(tables) == 4
    table = json.loads(tables[0].read_text())
    assert table["columns"][:2] == ["layer", "max_vio"] and [row[0] for row in table["data"]] == [
        "layer 0", "layer 1", "layer 2",
    ]  # fmt: skip
    assert table["data"][0][1] in [
        row["layers"][next(iter(loads))]["max_vio"] for row in read_records(tmp_path / "out").rows
    ]
    written = json.loads((tmp_path / "written.json").read_text())
    assert sum("moe/layers" in log for log in written["logs"]) == 4
    (alert,) = written["alerts"]
    assert alert["title"] == "unmoved_router: model.layers.2.mlp.gate" and "frozen" in alert["text"]


def test_confidence_is_measured_at_logged_steps_of_a_trainer(tmp_path):
    measured = []
    trainer = make_trainer(
        tiny_model("mixtral").train(), tmp_path, Trainer, data=rows(24), logging_steps=3, num_train_epochs=2
    )
    watch = phb.watch(trainer)
    add = watch._add
    watch._add = lambda counts: (measured.append(bool(counts.confidence.any())), add(counts))
    trainer.train()
    assert measured == [False, False, True, False, False, True]
    assert all("confidence" in layer for row in read_records(tmp_path).rows for layer in row["layers"].values())
