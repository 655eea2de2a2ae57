"""
ms-swift from its own command line, on tiny models and made problems.

Needs ms-swift: `nox -f recipes/environments/noxfile.py -s "tool(ms-swift)"`, or pytest in an environment that has it.
"""

import json

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("swift", reason="ms-swift pins versions of its own: see recipes/environments")

from tool_runs import COEF, assert_merged, effective, log_of, run, write_inputs

from hf_phibalance.watching import read_records


TOOL = "ms-swift"
PLUGIN = f"from hf_phibalance.integrations import swift\n\nswift.register(coef={COEF})\n"
WATCHING = "from hf_phibalance.integrations import swift\n\nswift.register(watch=True)\n"
REWARD = """
from swift.rewards import ORM, orms


class Vowels(ORM):
    def __call__(self, completions, **kwargs):
        return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


orms["vowels"] = Vowels
"""
# ms-swift packs only for flash attention, which does not run on a CPU. Without its check, sdpa is used.
PACKING = """
from swift.arguments import SftArguments


def check_padding_free(self):
    self.padding_free = self.padding_free or self.packing


SftArguments._check_padding_free = check_padding_free
"""
BALANCED = ["--external_plugins", "plugin.py", "--callbacks", "phi_balance"]
OPTIONS = {
    "template": "qwen",
    "torch_dtype": "float32",
    "attn_impl": "sdpa",
    "use_hf": "true",
    "use_cpu": "true",
    "max_length": "512",
    "split_dataset_ratio": "0",
    "dataset_num_proc": "1",
    "dataloader_num_workers": "0",
    "add_version": "false",
    "report_to": "none",
    "max_steps": "2",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "learning_rate": "0",
    "max_grad_norm": "0",
    "save_steps": "1",
    "logging_steps": "1",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    rows = write_inputs(folder)
    asked = [[{"role": "user", "content": row["question"]}] for row in rows]
    told = [[*ask, {"role": "assistant", "content": row["answer"]}] for ask, row in zip(asked, rows)]
    for name, conversations in (("sft", told), ("rl", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    for name, text in (("plugin", PLUGIN), ("watching", WATCHING), ("reward", REWARD), ("packing", PACKING)):
        (folder / f"{name}.py").write_text(text)
    return folder


def train(inputs, out, family, *more, method=("sft",), data="sft", record=False, changes=(), **environment):
    """Trains by the command of ms-swift. Returns the folder of the run; the command writes to `out` in it."""
    folder = inputs / out
    folder.mkdir()
    for path in [*inputs.glob("*.py"), inputs / f"{data}.jsonl"]:
        (folder / path.name).symlink_to(path)
    options = OPTIONS | dict(changes) | {"model": str(inputs / family), "model_type": family, "output_dir": "out"}
    options["dataset"] = f"{data}.jsonl"
    command = ["swift", *method, *(word for name, value in options.items() for word in (f"--{name}", value)), *more]
    folder.joinpath("printed").write_text(run(command, folder, record, **environment))
    return folder


LORA = ["--tuner_type", "lora", "--lora_dropout", "0"]
PARAMETERS = ["--target_parameters", "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FULL = ["--tuner_type", "full"]
ON_Q = [*LORA, "--target_modules", "q_proj"]
CASES = {  # family, options, environment, and how the table in guides/TOOLS.md names them
    "full": ("mixtral", FULL, {}, "full", "padded"),
    "checkpointing": ("qwen3_moe", [*FULL, "--gradient_checkpointing", "true"], {}, "full", "padded, checkpointing"),
    "lora": ("mixtral", [*LORA, "--target_modules", "all-linear"], {}, "LoRA on linear layers", "padded"),
    "lora-router": ("qwen3_moe", [*ON_Q, "--modules_to_save", "gate"], {}, "LoRA, routers whole", "padded"),
    "lora-parameters": ("qwen3_moe", [*ON_Q, *PARAMETERS], {}, "LoRA on experts and routers", "padded"),
    "two-ranks": ("mixtral", FULL, {"NPROC_PER_NODE": "2"}, "full", "padded, 2 ranks"),
}
LEARNS = {  # the log says this, unless all routers and experts learn in full
    "lora": "2 routers (2 frozen), experts (2 frozen)",
    "lora-router": "2 routers (2 full), experts (2 frozen)",
    "lora-parameters": "2 routers (2 lora), experts (2 lora)",
}


@pytest.mark.parametrize("case", CASES)
def test_sft_receives_the_coefficient(inputs, case, table_row):
    family, more, environment, trains, batches = CASES[case]
    balanced = train(inputs, case, family, *more, *BALANCED, record=True, **environment)
    plain = train(inputs, f"{case}-plain", family, *more, record=True, **environment)
    found = effective(inputs / family, balanced, plain, balanced / "out" / "checkpoint-1")
    assert found.padding > 0
    assert found.ratio == pytest.approx(1, abs=1e-4) and found.residual < 1e-4
    last = log_of(balanced / "out")[1]
    assert last["moe/tokens"] == found.tokens and last["moe/balance_loss"] > 0
    printed = (balanced / "printed").read_text()
    assert LEARNS.get(case, "") in printed and ("of 2 routers" in printed) == (case in LEARNS)
    table_row(model=family, trains=trains, batches=batches, coefficient=found.ratio)


@pytest.mark.parametrize("data", ["packed", "streamed"])
def test_packs_receive_the_coefficient(inputs, data, table_row):
    streaming = "true" if data == "streamed" else "false"
    more = [*FULL, "--packing", "true", "--streaming", streaming, "--external_plugins", "packing.py"]
    balanced = train(inputs, data, "qwen3_moe", *more, "plugin.py", "--callbacks", "phi_balance", record=True)
    plain = train(inputs, f"{data}-plain", "qwen3_moe", *more, record=True)
    found = effective(inputs / "qwen3_moe", balanced, plain, balanced / "out" / "checkpoint-1")
    assert found.ratio == pytest.approx(1, abs=1e-4) and found.residual < 1e-4
    assert log_of(balanced / "out")[1]["moe/tokens"] == found.tokens and found.padding == 0
    batches = "packed, streaming" if data == "streamed" else "packed"
    table_row(model="qwen3_moe", trains="full", batches=batches, coefficient=found.ratio)


def test_grpo_receives_the_coefficient(inputs, table_row):
    """Micro-batches are generated one after the other, so each gets its own mean."""
    pytest.importorskip("msgspec", reason="GRPO of ms-swift imports it without asking for it")
    more = ["--rlhf_type", "grpo", "--reward_funcs", "vowels", "--tuner_type", "full"]
    more += ["--num_generations", "2", "--max_completion_length", "12", "--external_plugins", "reward.py"]
    settings = {"method": ["rlhf"], "data": "rl", "record": True}
    balanced = train(inputs, "grpo", "mixtral", *more, "plugin.py", "--callbacks", "phi_balance", **settings)
    plain = train(inputs, "grpo-plain", "mixtral", *more, **settings)
    found = effective(inputs / "mixtral", balanced, plain, balanced / "out" / "checkpoint-1", means=True)
    assert found.ratio == pytest.approx(1, abs=1e-4) and found.residual < 1e-4
    assert log_of(balanced / "out")[1]["moe/tokens"] == found.tokens
    table_row(model="mixtral", trains="full, GRPO", batches="generated", coefficient=found.ratio)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(inputs, tuner, table_row):
    changes = {"max_steps": "4", "save_steps": "2", "learning_rate": "0.001", "tuner_type": tuner}
    whole = train(inputs, f"whole-{tuner}", "qwen3_moe", *BALANCED, changes=changes)
    resume = ["--resume_from_checkpoint", str(whole / "out" / "checkpoint-2")]
    resumed = train(inputs, f"resumed-{tuner}", "qwen3_moe", *BALANCED, *resume, changes=changes)
    weights = "model.safetensors" if tuner == "full" else "adapter_model.safetensors"
    for name in ("phi_balance.state", weights):
        expected, found = (load_file(run / "out" / "checkpoint-4" / name) for run in (whole, resumed))
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert not torch.equal(*(
        load_file(whole / "out" / f"checkpoint-{step}" / "phi_balance.state")["layers.0.mlp.gate.mean_probs"]
        for step in (2, 4)
    ))  # fmt: skip
    trains = "full" if tuner == "full" else "LoRA on linear layers"
    table_row(model="qwen3_moe", trains=trains, batches="padded", resumed="bit-identical")


def test_a_trained_adapter_is_merged(inputs):
    """With LoRA on fused experts and routers, the merged model has the logits of base and adapter."""
    changes = {"learning_rate": "0.01", "target_modules": "q_proj"}
    folder = train(inputs, "merged", "qwen3_moe", *LORA, *PARAMETERS, *BALANCED, changes=changes)
    adapter = folder / "out" / "checkpoint-2"
    command = ["swift", "export", "--adapters", str(adapter), "--merge_lora", "true", "--output_dir", "whole"]
    run([*command, "--use_hf", "true", "--torch_dtype", "float32"], folder)
    assert_merged(inputs / "qwen3_moe", adapter, folder / "whole", "mlp.gate.weight", "mlp.experts.down_proj")


def test_a_watched_run_ends_as_swift_alone(inputs):
    changes = {"learning_rate": "0.01"}
    alone = train(inputs, "alone", "mixtral", *FULL, changes=changes)
    plugin = ["--external_plugins", "watching.py", "--callbacks", "phi_balance"]
    watched = train(inputs, "watched", "mixtral", *FULL, *plugin, changes=changes)
    expected, found = (load_file(run / "out" / "checkpoint-2" / "model.safetensors") for run in (alone, watched))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert [row["step"] for row in read_records(watched / "out").rows] == [1, 2]
    assert not list(watched.glob("**/phi_balance.state"))


def test_a_second_auxiliary_loss_is_refused(inputs):
    with pytest.raises(RuntimeError, match=r"--router_aux_loss_coef 0\.01 adds a second auxiliary loss"):
        train(inputs, "refused", "qwen3_moe", *BALANCED, "--router_aux_loss_coef", "0.01")


def test_ranks_that_would_train_apart_are_refused(inputs):
    """On a CPU transformers does not see the process group that ms-swift makes, unless `--use_cpu true`."""
    with pytest.raises(RuntimeError, match="2 processes would train without exchanging gradients"):
        train(inputs, "apart", "mixtral", *BALANCED, changes={"use_cpu": "false"}, NPROC_PER_NODE="2")


def test_a_wrong_field_stops_the_command_before_the_model_is_loaded():
    from hf_phibalance.integrations import swift

    with pytest.raises(ValueError, match="unknown PhiBalanceConfig field"):
        swift.register(coeff=0.1)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpoints", ["true", "false"])
def test_the_audit_of_its_own_loss(inputs, checkpoints, accumulation):
    """`router_aux_loss_coef` does nothing with its checkpointing, which is on by default; else it arrives as set, within 1 %."""
    changes = {"gradient_accumulation_steps": str(accumulation), "router_aux_loss_coef": "0.02", "max_steps": "1"}
    changes["gradient_checkpointing"] = checkpoints
    name = f"audit-{checkpoints}-{accumulation}"
    run = train(inputs, name, "mixtral", *FULL, record=True, changes=changes, AUDIT="1")
    report = json.loads((run / "records" / "audit.json").read_text())
    assert report["declared"] == 0.02
    assert report["received"] == pytest.approx(0.02 * (checkpoints == "false"), rel=1e-2), report["checks"]
    assert ("checkpointing" in [check["name"] for check in report["checks"]]) == (checkpoints == "true")
