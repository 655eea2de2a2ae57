"""
Axolotl from its own command line, on tiny models and made problems.

Needs Axolotl: `nox -f recipes/environments/noxfile.py -s "tool(axolotl)"`, or pytest in an environment that has it.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file
from tool_runs import FAMILIES, SHAPE

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME
from hf_phibalance.models.tiny import build_model, train_tokenizer
from hf_phibalance.tasks import make_splits
from hf_phibalance.watching import read_records


pytest.importorskip("axolotl", reason="Axolotl pins versions of its own: see recipes/environments")
yaml = pytest.importorskip("yaml")

SWITCHES = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(SWITCHES)  # before Axolotl is imported, whose telemetry is on by default
TOOL = "axolotl"
PLUGIN = "hf_phibalance.integrations.axolotl.PhiBalancePlugin"
OPTIONS = {
    "dataset_num_proc": 1,
    "sequence_len": 256,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 4,
    "max_grad_norm": 0.0,
    "learning_rate": 0.001,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "bf16": False,
    "attn_implementation": "sdpa",
    "save_steps": 2,
    "logging_steps": 1,
    "plugins": [PLUGIN],
    "phi_balance": {"coef": 0.02},
}
PADDED = {"sample_packing": False, "eval_sample_packing": False}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a folder with made problems and a tiny model of each family."""
    folder = tmp_path_factory.mktemp("made")
    rows = make_splits(train=120)["train"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(f"{row['question']}\n{row['answer']}" for row in rows)
    for model_type, fields in FAMILIES.items():
        torch.manual_seed(0)
        build_model(model_type, SHAPE | fields | {"initializer_range": 0.2}, tokenizer).save_pretrained(
            folder / model_type
        )
        tokenizer.save_pretrained(folder / model_type)
    return folder


def write_config(made, name, model_type="mixtral", **options):
    """Returns the path of a config, and the folder that its run writes to."""
    rows = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\n"}
    files = {"path": str(made / "train.jsonl"), "ds_type": "json"}
    if "streaming" in options:
        files = {"path": "json", "data_files": files["path"]}
    config = {
        **OPTIONS,
        "base_model": str(made / model_type),
        "datasets": [{**files, "type": rows}],
        "dataset_prepared_path": str(made / "prepared"),
        "output_dir": str(made / name),
        **options,
    }
    path = made / f"{name}.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path, made / name


def axolotl(*arguments):
    """Runs the command `axolotl` with this package and the measuring plugin on its path."""
    found = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", *map(str, arguments)],
        env={**os.environ, **SWITCHES, "PYTHONPATH": os.pathsep.join(filter(None, found))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def train(made, name, *args, **options):
    config, folder = write_config(made, name, *args, **options)
    return axolotl("train", config, "--launcher", "python"), folder


def assert_same_files(folder, other, *names):
    for name in names:
        tensors, others = load_file(folder / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            assert torch.equal(value, others[key]), f"{name}: {key}"


STREAMED = {"streaming": True, "train_on_inputs": True, "phi_balance": {"coef": 0.02, "token_mask": "labels"}}
ADAPTED = "LoRA on attention, experts and routers"
CASES = {  # family, options, and how the table in guides/TOOLS.md names them
    "full-packed": ("mixtral", {}, "full", "packed"),
    "full-padded": ("mixtral", PADDED, "full", "padded"),
    "full-streamed": ("mixtral", STREAMED, "full", "packed, streaming, `token_mask: labels`"),
    "lora-packed": ("qwen3_moe", LORA, ADAPTED, "packed"),
    "lora-padded": ("qwen3_moe", LORA | PADDED | {"gradient_checkpointing": True}, ADAPTED, "padded, checkpointing"),
}


@pytest.mark.parametrize("case", CASES)
def test_optimizer_receives_the_declared_coefficient(made, case, table_row):
    model_type, options, trains, batches = CASES[case]
    plugins = [PLUGIN, "axolotl_measuring.MeasuringPlugin"]
    _, folder = train(made, case, model_type, plugins=plugins, **options)
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["ratio"] == pytest.approx(1, abs=1e-4)
    assert measured["residual"] < 1e-4
    assert measured["padding"] > 0  # which a coefficient that is off by its share would have paid
    assert (measured["samples"] > 2 * measured["micro_batches"]) == (options.get("sample_packing") is None)
    table_row(model=model_type, trains=trains, batches=batches, coefficient=measured["ratio"])


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_resumed_run_ends_as_the_uninterrupted_one(made, options, table_row):
    """With the rows in the order of the file: Axolotl draws another order after resuming, also without the plugin."""
    options = options | {"curriculum_sampling": True, "phi_balance": {"coef": 0.02, "bias_coef": 0.01}}
    weights = "adapter_model.safetensors" if "adapter" in options else "model.safetensors"
    name = f"whole-{weights}"
    said, whole = train(made, name, "qwen3_moe", **options)
    assert ("of 2 routers (2 lora), experts (2 lora)" in said) == ("adapter" in options)
    _, resumed = train(
        made, f"resumed-{weights}", "qwen3_moe", resume_from_checkpoint=str(whole / "checkpoint-2"), **options
    )
    assert_same_files(whole, resumed, weights, STATE_NAME)
    trains = ADAPTED if "adapter" in options else "full"
    table_row(model="qwen3_moe", trains=trains, batches="packed", resumed="bit-identical")
    if "adapter" in options:
        check_merged(made, made / f"{name}.yml", whole)


def check_merged(made, config, adapted):
    """The merged model has the selection bias, the logits of base and adapter, and routers that have learnt."""
    from peft import PeftModel

    axolotl("merge-lora", config, "--merge-method", "legacy")
    assert_same_files(adapted, adapted / "merged", STATE_NAME)
    merged = phb.AutoModelForCausalLM.from_pretrained(adapted / "merged", phi_balance=True).eval()
    base = phb.AutoModelForCausalLM.from_pretrained(made / "qwen3_moe", phi_balance={"coef": 0.02, "bias_coef": 0.01})
    model = PeftModel.from_pretrained(base, adapted).eval()
    phb.get_balancer(model).load(adapted)
    ids = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    start = load_file(made / "qwen3_moe" / "model.safetensors")
    routers = [name for name in start if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and not any(torch.equal(start[name], merged.get_parameter(name)) for name in routers)


def test_at_strength_zero_and_watched_axolotl_trains_as_without_the_plugin(made):
    _, counted = train(made, "counted", phi_balance={"coef": 0.0})
    _, plain = train(made, "plain", plugins=None, phi_balance=None)
    _, off = train(made, "off", phi_balance=False)
    _, watched = train(made, "watched", phi_balance=None, watch=True)
    for other in (counted, off, watched):
        assert_same_files(plain, other, "model.safetensors")
    assert [row["step"] for row in read_records(watched).rows] == [1, 2, 3, 4]
    assert not list(watched.glob(f"**/{STATE_NAME}"))
    assert (counted / "checkpoint-2" / STATE_NAME).is_file()
    assert not (plain / STATE_NAME).exists() and not (off / STATE_NAME).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phi_balance": {"coeff": 0.1}}, "unknown PhiBalanceConfig field.*'coeff'"),
        ({"phi_balance": {"coef": -1.0}}, "`coef` must lie in"),
        ({"phi_balance": {"method": "loss_free", "coef": 0.5}}, "method='loss_free' does not read it"),
        ({"phi_balance": 0.01}, "`phi_balance` must be a PhiBalanceConfig"),
        ({"phi_balance": None}, "phi_balance is missing"),
        ({"phi_balance": None, "watch": True, "streaming": True}, "{method: none, token_mask: labels}"),
        ({"overrides_of_model_config": {"router_aux_loss_coef": 0.02}}, "router_aux_loss_coef: 0.02 adds a second"),
        ({"overrides_of_model_config": {"output_router_logits": True}}, "output_router_logits: True adds a second"),
        ({"streaming": True}, "streaming: true with sample_packing fills.*token_mask: labels"),
        (
            LORA | {"phi_balance": {"coef": 0.0, "bias_coef": 0.01}, "merge_lora": True},
            "merge_method: memory_efficient merges files.*Set merge_method: legacy",
        ),
    ],
)
def test_configs_that_are_refused(made, options, message):
    from axolotl.cli.config import load_cfg

    config, _ = write_config(made, "refused", **options)
    with pytest.raises(ValueError, match=message):
        load_cfg(str(config))


def test_without_the_plugin_axolotl_drops_the_key(made):
    """As guides/TOOLS.md says, and how one notices: it is not in the config, which Axolotl prints."""
    from axolotl.cli.config import load_cfg

    config, _ = write_config(made, "forgotten", plugins=None)
    assert "phi_balance" in config.read_text() and "phi_balance" not in load_cfg(str(config))


def test_all_fields_pass_through(made):
    from axolotl.cli.config import load_cfg

    fields = {"coef": 0.5, "potential": "tsallis", "potential_kwargs": {"alpha": 1.1}, "token_mask": "labels"}
    config, _ = write_config(made, "fields", phi_balance=fields)
    cfg = load_cfg(str(config))
    assert phb.PhiBalanceConfig.from_dict(cfg.phi_balance.to_dict()) == phb.PhiBalanceConfig(**fields)


def test_packs_whose_mask_is_dropped_by_family_are_refused():
    """Axolotl deletes the mask of a Gemma 4 just before its forward."""
    from axolotl.utils.dict import DictDefault
    from tiny import tiny_model

    from hf_phibalance.integrations.axolotl import PhiBalancePlugin

    model = tiny_model("gemma4_text")
    model.config.model_type = "gemma4"
    cfg = DictDefault(phi_balance={"coef": 0.02}, sample_packing=True)
    with pytest.raises(ValueError, match=r"sample_packing: true with gemma4.*token_mask: labels"):
        PhiBalancePlugin().post_model_load(cfg, model)


def test_state_is_saved_where_axolotl_writes_only_an_adapter(tmp_path):
    from axolotl.utils.dict import DictDefault
    from tiny import tiny_model

    from hf_phibalance.integrations.axolotl import PhiBalancePlugin

    model = phb.patch(tiny_model("mixtral"))
    PhiBalancePlugin().post_train(
        DictDefault(phi_balance={"coef": 0.01}, output_dir=str(tmp_path), local_rank=0), model
    )
    phb.get_balancer(model).load(tmp_path)
