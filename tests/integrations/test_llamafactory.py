"""
LLaMA-Factory from the command line, on tiny models and made problems.

Needs LLaMA-Factory: `nox -f recipes/environments/noxfile.py -s "tool(llamafactory)"`, or pytest in an environment that has it.
"""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("llamafactory", reason="LLaMA-Factory pins versions of its own: see recipes/environments")

from tool_runs import COEF, assert_merged, effective, log_of, run, write_inputs

from hf_phibalance.watching import read_records


TOOL = "llamafactory"
OURS = [sys.executable, "-m", "hf_phibalance.integrations.llamafactory", "train"]
THEIRS = ["llamafactory-cli", "train"]
OPTIONS = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "made",
    "template": "default",
    "cutoff_len": 512,
    "overwrite_cache": True,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "flash_attn": "sdpa",
    "output_dir": "out",
    "report_to": "none",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "save_steps": 1,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    rows = write_inputs(folder)
    made = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in rows]
    (folder / "made.json").write_text(json.dumps(made))
    (folder / "dataset_info.json").write_text(json.dumps({"made": {"file_name": "made.json"}}))
    return folder


def train(inputs, out, family, balance=None, record=False, overrides=(), environment=None, **changes):
    """Trains by our command, or without `balance` by LLaMA-Factory's. Returns the folder of the run."""
    folder = inputs / out
    folder.mkdir()
    options = OPTIONS | {"model_name_or_path": str(inputs / family), "dataset_dir": str(inputs)} | changes
    if balance is not None:
        options["phi_balance"] = balance
    (folder / "config.yaml").write_text(json.dumps(options))  # JSON is YAML
    command = [*(THEIRS if balance is None else OURS), "config.yaml", *overrides]
    (folder / "printed").write_text(run(command, folder, record, **(environment or {})))
    return folder


LORA = {"finetuning_type": "lora", "lora_rank": 4}
TWO_RANKS = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
WHOLE = {**LORA, "lora_target": "q_proj,v_proj", "additional_target": "gate,experts"}
CASES = {  # family, options, environment, and how the table in guides/TOOLS.md names them
    "full": ("mixtral", {}, {}, "full", "padded, checkpointing"),
    "no-checkpointing": ("qwen3_moe", {"disable_gradient_checkpointing": True}, {}, "full", "padded"),
    "lora": ("mixtral", {**LORA, "lora_target": "all"}, {}, "LoRA on linear layers", "padded, checkpointing"),
    "lora-router": ("qwen3_moe", WHOLE, {}, "LoRA, routers and experts whole", "padded, checkpointing"),
    "packed": ("mixtral", {"packing": True, "neat_packing": True}, {}, "full", "packed, checkpointing"),
    "two-ranks": ("qwen3_moe", {}, TWO_RANKS, "full", "padded, checkpointing, 2 ranks"),
}
LEARNS = {"lora": "2 routers (2 frozen), experts (2 frozen)"}  # what the log says where not all of them learn in full


@pytest.mark.parametrize("case", CASES)
def test_sft_receives_the_coefficient(inputs, case, table_row):
    family, changes, environment, trains, batches = CASES[case]
    settings = {"record": True, "environment": environment, **changes}
    balanced = train(inputs, case, family, {"coef": COEF}, **settings)
    plain = train(inputs, f"{case}-plain", family, **settings)
    found = effective(inputs / family, balanced, plain, balanced / "out" / "checkpoint-1")
    assert found.padding > 0
    assert found.ratio == pytest.approx(1, abs=1e-4) and found.residual < 1e-4
    last = log_of(balanced / "out")[1]
    assert last["moe/tokens"] == found.tokens and last["moe/balance_loss"] > 0
    printed = (balanced / "printed").read_text()
    assert LEARNS.get(case, "") in printed and ("of 2 routers" in printed) == (case in LEARNS)
    table_row(model=family, trains=trains, batches=batches, coefficient=found.ratio)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(inputs, tuner, table_row):
    changes = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.001, "finetuning_type": tuner}
    whole = train(inputs, f"whole-{tuner}", "qwen3_moe", {"coef": 0.01}, **changes)
    resume = [f"resume_from_checkpoint={whole / 'out' / 'checkpoint-2'}"]
    resumed = train(inputs, f"resumed-{tuner}", "qwen3_moe", {"coef": 0.01}, overrides=resume, **changes)
    weights = "model.safetensors" if tuner == "full" else "adapter_model.safetensors"
    for name in ("phi_balance.state", weights):
        expected, found = (load_file(run / "out" / "checkpoint-4" / name) for run in (whole, resumed))
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    trains = "full" if tuner == "full" else "LoRA on linear layers"
    table_row(model="qwen3_moe", trains=trains, batches="padded, checkpointing", resumed="bit-identical")


def test_a_trained_adapter_is_merged(inputs):
    """With routers and experts trained whole, the merged model has the logits of base and adapter."""
    adapter = train(inputs, "adapter", "qwen3_moe", {"coef": COEF}, **WHOLE, learning_rate=0.01) / "out"
    options = {"model_name_or_path": str(inputs / "qwen3_moe"), "adapter_name_or_path": str(adapter)}
    options |= {"template": "default", "export_dir": "whole", "finetuning_type": "lora", "infer_dtype": "float32"}
    (adapter.parent / "export.yaml").write_text(json.dumps(options))
    run(["llamafactory-cli", "export", "export.yaml"], adapter.parent)
    moved = ("mlp.gate.weight", "mlp.experts.down_proj", "q_proj.weight")
    assert_merged(inputs / "qwen3_moe", adapter, adapter.parent / "whole", *moved)


def test_overrides_reach_the_configuration(inputs):
    """`phi_balance.coef=0` on the command line: tokens are counted, and no gradient is added."""
    out = train(inputs, "overridden", "mixtral", {"coef": COEF}, overrides=["phi_balance.coef=0"]) / "out"
    rows = [row for row in log_of(out) if "loss" in row]
    assert len(rows) == 2 and all("moe/max_vio" in row and "moe/balance_loss" not in row for row in rows)


def test_a_watched_run_ends_as_llamafactory_alone(inputs):
    alone = train(inputs, "alone", "mixtral", learning_rate=0.01)
    watched = train(inputs, "watched", "mixtral", balance=False, learning_rate=0.01, watch=True)
    expected, found = (load_file(run / "out" / "model.safetensors") for run in (alone, watched))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert [row["step"] for row in read_records(watched / "out").rows] == [1, 2]
    assert not list(watched.glob("**/phi_balance.state"))


BALANCED = {"phi_balance": {"coef": 0.01}}
REFUSED = {
    "both losses": (BALANCED | {"moe_aux_loss_coef": 0.01}, "moe_aux_loss_coef: 0.01 adds a second auxiliary loss"),
    "padded packs": (BALANCED | {"packing": True}, "packing: true without neat_packing"),
    "another loop": (BALANCED | {"stage": "ppo"}, "stage: ppo has a training loop of its own"),
    "other processes": (BALANCED | {"use_ray": True}, "use_ray: true does not train"),
    "wrong field": ({"phi_balance": {"coeff": 0.01}}, "unknown PhiBalanceConfig field"),
    "no field": ({}, "`phi_balance` is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path, monkeypatch):
    from hf_phibalance.integrations import llamafactory

    options, message = REFUSED[case]
    (tmp_path / "config.yaml").write_text(json.dumps(OPTIONS | options))
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "config.yaml")])
    with pytest.raises(ValueError, match=message):
        llamafactory.run(lambda options: pytest.fail("LLaMA-Factory was started"))


def test_false_runs_llamafactory_as_it_is(tmp_path, monkeypatch):
    from hf_phibalance.integrations import llamafactory

    (tmp_path / "config.yaml").write_text(json.dumps(OPTIONS | {"moe_aux_loss_coef": 0.01, "phi_balance": False}))
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "config.yaml")])
    started = []
    llamafactory.run(started.append)
    assert started == [OPTIONS | {"moe_aux_loss_coef": 0.01}]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_audit_of_its_own_loss(inputs, checkpoints, accumulation):
    """`moe_aux_loss_coef` does nothing with its checkpointing, which is on by default; else it arrives times the micro-batches."""
    changes = {"gradient_accumulation_steps": accumulation, "moe_aux_loss_coef": 0.02, "max_steps": 1}
    changes["disable_gradient_checkpointing"] = not checkpoints
    name = f"audit-{checkpoints}-{accumulation}"
    run = train(inputs, name, "mixtral", record=True, environment={"AUDIT": "1"}, **changes)
    report = json.loads((run / "records" / "audit.json").read_text())
    assert report["declared"] == 0.02
    assert report["received"] == pytest.approx(0 if checkpoints else 0.02 * accumulation, rel=1e-3), report["checks"]
    assert ("checkpointing" in [check["name"] for check in report["checks"]]) == checkpoints
