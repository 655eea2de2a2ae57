"""A run resumes only from complete checkpoints, whenever the run before was killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import transformers
from invariance import in_ranks
from packaging.version import Version
from paths import ROOT
from test_resume import ARGUMENTS, STEPS, StopAt, assert_same_outcome, run
from tiny import tiny_model
from training import make_trainer, patched, rows
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


pytestmark = pytest.mark.slow


MARK = "trainer_state.json"


def make_checkpoints(folder, **marks):
    """Makes the folder of a checkpoint for each `step_4=mark`; without a mark for `None`."""
    for step, mark in marks.items():
        checkpoint = folder / step.replace("step_", "checkpoint-")
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        if mark is not None:
            (checkpoint / MARK).write_text(mark)


def whole(step):
    return json.dumps({"global_step": step})


@pytest.mark.parametrize("mark", [None, "", '{"global_step": 1', "[]", "{}", "\x00" * 40])
def test_unfinished_checkpoint_is_passed_over(mark, tmp_path, warned):
    make_checkpoints(tmp_path, step_8=whole(8), step_9=whole(9), step_10=mark)
    (tmp_path / "checkpoint-11").write_text("no folder")
    make_checkpoints(tmp_path / "others", step_12=whole(12))
    (tmp_path / "checkpoint-kept").mkdir()
    assert Path(get_last_checkpoint(tmp_path)).name == "checkpoint-10"
    assert phb.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert len(warned.about("checkpoint-10 in")) == len(warned.about("newest complete one is checkpoint-9")) == 1


def test_newest_is_the_one_of_the_largest_step(tmp_path, warned):
    make_checkpoints(tmp_path, step_2=whole(2), step_9=whole(9), step_10=whole(10))
    assert phb.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert not warned.lines


def test_no_complete_checkpoint(tmp_path, warned):
    assert phb.last_checkpoint(tmp_path / "missing") is None
    assert phb.last_checkpoint(tmp_path) is None
    assert not warned.lines
    make_checkpoints(tmp_path, step_2=None, step_4="{")
    assert phb.last_checkpoint(tmp_path) is None
    assert warned.about("checkpoint-4, checkpoint-2 in") and warned.about("There is no complete one")


def break_off(checkpoint):
    """Makes `checkpoint` look as if the run had been killed while it wrote `optimizer.pt`."""
    for name in ("scheduler.pt", "rng_state.pth", STATE_NAME, MARK):
        (checkpoint / name).unlink()
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])


def test_resuming_takes_the_newest_complete_one(tmp_path, warned):
    straight = run(tmp_path / "straight", "bias")
    folder = tmp_path / "stopped"
    run(folder, "bias", callbacks=[StopAt(4)])
    break_off(folder / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4'.* is not complete.*phb\.last_checkpoint\(output_dir\)"):
        run(folder, "bias", resume=str(folder / "checkpoint-4"))
    assert_same_outcome(run(folder, "bias", resume=True, seed=1), straight)
    assert warned.about("newest complete one is checkpoint-2")
    for checkpoint in folder.glob("checkpoint-*"):
        break_off(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-6, checkpoint-4, checkpoint-2 in .*: none is complete.*=False"):
        run(folder, "bias", resume=True)


def test_without_any_checkpoint_the_trainer_says_so(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run(tmp_path, resume=True)


# ---------------------------------------------------------------------- the order in which one is written


class Watched(Trainer):
    """Notes whether a checkpoint looks complete when its files begin to be written."""

    def save_model(self, output_dir=None, _internal_call=False):
        self.looked_complete = (Path(output_dir) / MARK).is_file()
        super().save_model(output_dir, _internal_call)


def test_mark_goes_before_anything_is_written_again(tmp_path):
    for _ in range(2):
        trainer = run(tmp_path, cls=Watched, callbacks=[StopAt(2)])
        assert not trainer.looked_complete
        assert phb.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    plain = make_trainer(
        tiny_model("qwen3_moe").train(), tmp_path, Watched, data=rows(14), callbacks=[StopAt(2)], **ARGUMENTS
    )
    plain.train()
    assert plain.looked_complete  # a `Trainer` by itself


def test_older_checkpoints_go_when_the_new_one_is_complete(tmp_path, monkeypatch):
    deleted, remove = [], shutil.rmtree

    def watched_remove(path, **kwargs):
        rest = [other for other in tmp_path.glob("checkpoint-*") if other != Path(path)]
        deleted.append((Path(path).name, {other.name: {file.name for file in other.iterdir()} for other in rest}))
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched_remove)
    run(tmp_path, callbacks=[StopAt(4)], save_total_limit=1)
    [(name, rest)] = deleted
    assert name == "checkpoint-2"
    assert rest["checkpoint-4"] >= {MARK, STATE_NAME, "model.safetensors", "optimizer.pt", "rng_state.pth"}
    assert not any(file.endswith(".partial") for file in rest["checkpoint-4"])


def test_checkpoint_beside_the_schedule_has_its_duals(tmp_path, monkeypatch):
    """
    `enable_jit_checkpoint` writes one when the job is told to end: there is no `on_save`. A trial of a hyperparameter search has a
    folder of its own.
    """
    trainer = run(tmp_path, callbacks=[StopAt(1)], save_strategy="no")
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / (trial or "")))
    for trial, folder in ((None, tmp_path), ("run-1", tmp_path / "run-1")):
        trainer._save_checkpoint(trainer.model, trial=trial)
        assert {path.name for path in (folder / "checkpoint-1").iterdir()} >= {STATE_NAME, MARK, "model.safetensors"}
        assert phb.last_checkpoint(folder) == str(folder / "checkpoint-1")


def test_run_that_was_over_stays_as_it_is(tmp_path):
    """A run that was killed after its last checkpoint starts again: it trains nothing and overwrites nothing."""
    straight = run(tmp_path, "bias")
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert_same_outcome(run(tmp_path, "bias", resume=True, seed=1), straight)
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before


# ---------------------------------------------------------------------- ranks with disks of their own


def checkpoint_taken(root):
    """Returns the checkpoint that a rank resumes from. The disk of rank 0 has one more."""
    rank = dist.get_rank()
    folder = Path(root) / str(rank)
    make_checkpoints(folder, step_2=whole(2), step_4=whole(4), step_6=None if rank else whole(6))
    trainer, taken = make_trainer(patched(), folder), []
    trainer.train = lambda resume_from_checkpoint: taken.append(resume_from_checkpoint)
    phb.attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    return [str(Path(path).relative_to(root)) for path in taken]


def test_ranks_take_the_same_checkpoint(tmp_path):
    assert in_ranks(checkpoint_taken, 2, str(tmp_path)) == [["0/checkpoint-4"], ["1/checkpoint-4"]]


# ---------------------------------------------------------------------- kills


def test_killed_runs_end_as_the_untouched_one(tmp_path):
    """One process and two, each killed once at five moments (one of them a full disk): bit-identical at the end."""
    moments = ["backward", "update", "checkpoint", "state", "disk"]
    # transformers before 5.20 cannot resume two CPU processes, balanced or not: it loads the optimizer to a device "cpu:0"
    ranks = [1, 2] if Version(transformers.__version__) >= Version("5.20") else [1]
    out = tmp_path / "tallies.json"
    options = ["--kills", "1", "--json", out, "--moments", *moments, "--ranks", *map(str, ranks)]
    script = [ROOT / "tests/helpers/crash.py", *options]
    process = subprocess.run(
        [sys.executable, *script],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    tallies = json.loads(out.read_text())
    assert [(t["moment"], t["ranks"]) for t in tallies] == [(m, number) for number in ranks for m in moments]
    assert all((t["kills"], t["faults"]) == (1, []) for t in tallies)
    assert all(t["identical"] == t["runs"] >= 1 for t in tallies) and any(t["unfinished"] for t in tallies)
