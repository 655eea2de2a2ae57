"""The name of the state: no engine takes it for weights, that of earlier versions is still read, and goes when it is written anew."""

import os
import signal
import sys
from fnmatch import fnmatch

import pytest
import torch
from checks import assert_same
from safetensors.torch import load_file, save_file
from trained import BIAS, duals, trained

import hf_phibalance as phb
from hf_phibalance import durable
from hf_phibalance.balancing import read_state
from hf_phibalance.balancing.state import save_state
from hf_phibalance.sidecar import EARLIER_STATE_NAME, STATE_NAME, state_in


# of vLLM, SGLang, TGI, llama.cpp and MLX
GLOBS_OF_ENGINES = (
    "*.safetensors",
    "model*.safetensors",
    "consolidated*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.npz",
)


def write(folder, steps, name=STATE_NAME):
    """A state that says no more than a number of steps, under its present name or another."""
    made = save_state({"steps": torch.tensor(steps)}, phb.PhiBalanceConfig(), {"type": "any", "routers": {}}, folder)
    return made.rename(folder / name)


def steps_in(folder):
    return int(read_state(folder).tensors["steps"])


def test_no_engine_takes_it_for_weights():
    assert fnmatch(EARLIER_STATE_NAME, GLOBS_OF_ENGINES[0])
    assert not [glob for glob in GLOBS_OF_ENGINES if fnmatch(STATE_NAME, glob)]


def test_a_model_of_an_earlier_version_loads_and_is_saved_under_the_new_name(tmp_path):
    model = trained("mixtral", BIAS)
    model.save_pretrained(tmp_path)
    (tmp_path / STATE_NAME).rename(tmp_path / EARLIER_STATE_NAME)
    before = load_file(tmp_path / EARLIER_STATE_NAME)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(duals(loaded), duals(model))
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / EARLIER_STATE_NAME).exists()
    assert_same(load_file(tmp_path / STATE_NAME), before)


def test_of_both_the_new_one_counts(tmp_path):
    write(tmp_path, 1, EARLIER_STATE_NAME)
    assert steps_in(tmp_path) == 1
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", 2).rename(tmp_path / STATE_NAME)
    assert state_in(tmp_path) == tmp_path / STATE_NAME and steps_in(tmp_path) == 2
    assert state_in(tmp_path / "other") is None and state_in(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", ["weights", "text"])
def test_what_is_not_ours_is_refused_and_stays(content, tmp_path):
    """Somebody else's file may have that name; and of a damaged one it cannot be said whose it is."""
    path = tmp_path / EARLIER_STATE_NAME
    if content == "weights":
        save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    else:
        path.write_text("not a state")
    with pytest.raises(ValueError, match=rf"{EARLIER_STATE_NAME} (was not written by hf_phibalance|is damaged)"):
        read_state(tmp_path)
    there = path.read_bytes()
    write(tmp_path, 1)
    assert path.read_bytes() == there and steps_in(tmp_path) == 1


def save_and_die(folder, event, name):
    """A process that saves, and gets SIGKILL as `os.rename` or `os.remove` of what is called `name` is about to happen."""

    def kill(happens, args):
        if happens == event and os.path.basename(args[0]) == name:
            os.kill(os.getpid(), signal.SIGKILL)

    writer = os.fork()
    if not writer:
        sys.addaudithook(kill)
        try:
            write(folder, 2)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])


@pytest.mark.parametrize(
    ("event", "name", "left", "steps"),
    [
        ("os.rename", "phi_balance.partial", {EARLIER_STATE_NAME, "phi_balance.partial"}, 1),
        ("os.remove", EARLIER_STATE_NAME, {EARLIER_STATE_NAME, STATE_NAME}, 2),
    ],
    ids=["before the new name", "before the old one goes"],
)
def test_a_kill_in_between_loses_nothing(event, name, left, steps, tmp_path):
    write(tmp_path, 1, EARLIER_STATE_NAME)
    assert save_and_die(tmp_path, event, name) == -signal.SIGKILL
    assert set(os.listdir(tmp_path)) == left and steps_in(tmp_path) == steps
    write(tmp_path, 3)
    assert os.listdir(tmp_path) == [STATE_NAME] and steps_in(tmp_path) == 3


def test_the_old_one_goes_when_the_new_one_has_reached_the_disk(tmp_path, monkeypatch):
    write(tmp_path, 1, EARLIER_STATE_NAME)
    done, flush, unlink = [], durable.flush, os.unlink
    monkeypatch.setattr(durable, "flush", lambda path: (done.append(f"flush {path.name}"), flush(path)))
    monkeypatch.setattr(os, "unlink", lambda path, **how: (done.append(f"remove {path.name}"), unlink(path, **how)))
    write(tmp_path, 2)
    assert done[-3:] == ["flush phi_balance.partial", f"flush {tmp_path.name}", f"remove {EARLIER_STATE_NAME}"]
