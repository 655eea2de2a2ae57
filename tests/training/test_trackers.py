"""Every metric reaches the real trackers, without a network: TensorBoard, trackio and offline wandb under one `Trainer` run."""

import importlib.util
import json
import os
import socket
import struct

import pytest
from forked import call


TRACKERS = ["tensorboard", "trackio", "wandb"]
INSTALLED = [name for name in TRACKERS if importlib.util.find_spec(name)]
PROJECT, RUN = "phi-balance-test", "tiny"
BLOCK = 2**15  # bytes of a block in wandb's file


def train(folder):
    """Trains two epochs with an evaluation after each, in a process of its own."""
    from training import make_trainer, patched, rows

    import hf_phibalance as phb

    refused, connect, resolve = [], socket.socket.connect, socket.getaddrinfo

    def connect_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            refused.append(str(address))
            raise OSError("the network is blocked in this test")
        return connect(self, address)

    def resolve_here(host, *args, **kwargs):
        if host not in ("127.0.0.1", "::1", "localhost", None, ""):
            refused.append(str(host))
            raise socket.gaierror("the network is blocked in this test")
        return resolve(host, *args, **kwargs)

    socket.socket.connect, socket.getaddrinfo = connect_here, resolve_here
    trainer = make_trainer(
        patched(), folder / "out", eval_dataset=rows(4, seed=1), eval_strategy="epoch", report_to=INSTALLED,
        run_name=RUN, project=PROJECT, trackio_static_space_id=False,
    )  # fmt: skip
    phb.attach(trainer, per_layer=2)
    trainer.train()
    trainer.evaluate(rows(6, seed=2), metric_key_prefix="test")
    names = phb.get_balancer(trainer.model).layer_names
    written = {"log": trainer.state.log_history, "refused": refused, "layers": names}
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
    places = {"HOME": folder, "TENSORBOARD_LOGGING_DIR": folder / "tensorboard", "TRACKIO_DIR": folder / "trackio"}
    places = {name: str(path) for name, path in places.items()} | {"WANDB_DIR": str(folder)}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = call(train, folder, cwd=folder, env=os.environ | places | settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "written.json").read_text())


def expected(log):
    """`{step: {key: value}}` of our metrics, with keys as reporters name them: `train/moe/...`, `eval/moe/...`."""
    entries = {}
    for entry in log:
        for key, value in entry.items():
            prefix, _, name = key.partition("moe/")
            if name:
                entries.setdefault(entry["step"], {})[f"{prefix.rstrip('_') or 'train'}/moe/{name}"] = value
    return entries


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return [
        (event.step, {tag: event.value}) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)
    ]


def read_wandb(folder):
    """Reads the history in the one `.wandb` file: a log of protocol buffers in blocks, as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("run-*.wandb")
    content, position, pending, entries = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0 or BLOCK - position % BLOCK < 7:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, pending = Record.FromString(pending), b""
            if record.HasField("history"):
                items = record.history.item
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                entries.append((values["train/global_step"], values))
    return entries


@pytest.mark.parametrize("tracker", TRACKERS)
def test_tracker_has_every_metric(tracker, request):
    if tracker not in INSTALLED:
        pytest.skip(f"{tracker} is not installed")
    folder, written = request.getfixturevalue("tracked")
    assert written["refused"] == []  # nothing left the machine
    if tracker == "trackio":
        entries = [(log["train/global_step"], log) for log in written["trackio"]]
    else:
        entries = (read_tensorboard if tracker == "tensorboard" else read_wandb)(folder / tracker)
    read = {}
    for step, values in entries:
        read.setdefault(step, {}).update({key: value for key, value in values.items() if "/moe/" in key})
    read = {step: values for step, values in read.items() if values}
    wanted = expected(written["log"])
    assert list(wanted) == [1, 2, 3, 4] and read.keys() == wanted.keys()
    for step, values in wanted.items():
        assert read[step] == pytest.approx(values, rel=1e-6, abs=1e-12), step
    names = set().union(*read.values())
    assert {"train/moe/max_vio", "train/moe/balance_loss", "eval/moe/max_vio", "test/moe/max_vio"} <= names
    for prefix in ("train", "eval", "test"):  # the first and the last of three layers
        shown = {key.partition("max_vio/")[2] for key in names if key.startswith(f"{prefix}/moe/max_vio/")}
        assert shown == {written["layers"][0], written["layers"][-1]}
