"""Metrics in real trackers: TensorBoard, trackio and offline wandb under one `Trainer` run, each one's files read back."""

import importlib.util
import json
import os
import socket
import struct

import pytest
from forked import call


pytestmark = pytest.mark.slow


TRACKERS = ["tensorboard", "trackio", "wandb"]
INSTALLED = [name for name in TRACKERS if importlib.util.find_spec(name)]
PROJECT, RUN = "phi-balance-test", "tiny"
PER_LAYER = 2  # of the three layers
# what trackers add to the entries of the log, or what reporters keep elsewhere
EXTRA = {"train/global_step", "_step", "_runtime", "_timestamp"}
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def train(folder):
    """A run of two epochs with an evaluation after each; runs in a process of its own, without a network."""
    from training import make_trainer, patched, rows

    import hf_phibalance as phb

    refused, connect = [], socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            refused.append(str(address))
            raise OSError("the network is blocked in this test")
        return connect(self, address)

    def resolve(host, *args, _original=socket.getaddrinfo, **kwargs):
        if host not in ("127.0.0.1", "::1", "localhost", None, ""):
            refused.append(str(host))
            raise socket.gaierror("the network is blocked in this test")
        return _original(host, *args, **kwargs)

    socket.socket.connect, socket.getaddrinfo = local_only, resolve
    trainer = make_trainer(
        patched(), folder / "out", eval_dataset=rows(4, seed=1), eval_strategy="epoch", report_to=INSTALLED,
        run_name=RUN, project=PROJECT, trackio_static_space_id=False,
    )  # fmt: skip
    phb.attach(trainer).per_layer = PER_LAYER
    trainer.train()
    trainer.evaluate(rows(6, seed=2), metric_key_prefix="test")
    written = {
        "log": trainer.state.log_history,
        "refused": refused,
        "layers": phb.get_balancer(trainer.model).layer_names,
    }
    if "trackio" in INSTALLED:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        trackio.finish()
        written["trackio"] = SQLiteStorage.get_logs(PROJECT, RUN)
    if "wandb" in INSTALLED:
        import wandb

        wandb.finish()
    (folder / "written.json").write_text(json.dumps(written, default=str))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    done = call(train, folder, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "written.json").read_text())


def expected(log):
    """`{step: {key: value}}` as reporters name it: `train/`, `eval/` and `test/` before every key."""
    entries = {}
    for entry in log:
        for key, value in entry.items():
            if key == "step" or key in SUMMARY:
                continue
            prefix = next((prefix for prefix in ("eval_", "test_") if key.startswith(prefix)), "")
            name = f"{prefix[:-1]}/{key.removeprefix(prefix)}" if prefix else f"train/{key}"
            entries.setdefault(entry["step"], {})[name] = value
    return entries


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    entries = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            entries.setdefault(event.step, {})[tag] = event.value
    return entries


def read_trackio(logs):
    entries = {}
    for log in logs:
        values = {key: value for key, value in log.items() if isinstance(value, int | float) and key not in EXTRA}
        entries.setdefault(log["train/global_step"], {}).update({key: v for key, v in values.items() if "/" in key})
    return entries


def read_wandb(folder):
    """History records of the one `.wandb` file: a log of protocol buffers in blocks of 32 KiB, as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("run-*.wandb")
    content, position, pending, entries = path.read_bytes(), 7, b"", {}
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block is padding
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0:
            position += 32768 - position % 32768
            continue
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, pending = Record.FromString(pending), b""
            if record.HasField("history"):
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = values.get("train/global_step")
                entries.setdefault(step, {}).update({key: value for key, value in values.items() if key not in EXTRA})
    return entries


@pytest.mark.parametrize("tracker", TRACKERS)
def test_tracker_has_every_metric(tracker, request):
    if tracker not in INSTALLED:
        pytest.skip(f"{tracker} is not installed")
    folder, written = request.getfixturevalue("tracked")
    read = {
        "tensorboard": lambda: read_tensorboard(folder / "tensorboard"),
        "trackio": lambda: read_trackio(written["trackio"]),
        "wandb": lambda: read_wandb(folder / "wandb"),
    }[tracker]()
    wanted = expected(written["log"])
    assert list(wanted) == [1, 2, 3, 4]
    for step, values in wanted.items():
        ours = {key: value for key, value in values.items() if "/moe/" in key}
        assert ours.keys() == {key for key in read[step] if "/moe/" in key}
        for key, value in ours.items():
            assert read[step][key] == pytest.approx(value, rel=1e-6, abs=1e-12), (step, key)
    names = set().union(*read.values())
    assert {"train/moe/max_vio", "train/moe/balance_loss", "eval/moe/max_vio", "test/moe/max_vio"} <= names
    for prefix in ("train", "eval", "test"):  # the first and the last of three layers
        shown = {key.partition("max_vio/")[2] for key in names if key.startswith(f"{prefix}/moe/max_vio/")}
        assert shown == {written["layers"][0], written["layers"][-1]}


@pytest.mark.skipif(not INSTALLED, reason="no tracker is installed")
def test_nothing_left_the_machine(tracked):
    assert tracked[1]["refused"] == []
