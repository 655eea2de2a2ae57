"""Runs the commands of training tools: their inputs, their processes, and the gradients of their optimizers."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from paths import HELPERS, ROOT
from transformers import AutoModelForCausalLM

import hf_phibalance as phb
from hf_phibalance.models import train_tokenizer
from hf_phibalance.models.tiny import build_model
from hf_phibalance.tasks import make_splits


COEF = 5.0  # large, so that float32 resolves what is added to the task gradient
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
FAMILIES = {"mixtral": {"num_local_experts": 8}, "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16}}
PAD = 0  # of `train_tokenizer`; no other token has this id


def write_inputs(folder: Path) -> list[dict[str, str]]:
    """Writes a tiny random model of each family to `folder`. Returns generated problems of very different lengths."""
    rows = make_splits(24)["train"]
    tokenizer = train_tokenizer([row["question"] + row["answer"] for row in rows], vocab_size=320)
    for family, fields in FAMILIES.items():
        torch.manual_seed(0)
        build_model(family, SHAPE | fields, tokenizer).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return rows


def run(command: list[str], folder: Path, record: bool = False, **environment: str) -> str:
    """Runs `command` in `folder`, returns its output. `record`: writes the optimizer's gradients to `OUT/rec`."""
    paths = [str(ROOT)]
    if record:
        paths.insert(0, str(HELPERS / "recorder"))
        (folder / "records").mkdir(exist_ok=True)
        environment["RECORD_TO"] = str(folder / "records")
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


@dataclass
class Effective:
    """Compares what balancing added to an optimizer's gradient with the definition."""

    ratio: float
    residual: float
    tokens: int
    padding: int


def effective(model: Path, balanced: Path, plain: Path, checkpoint: Path, means: bool = False) -> Effective:
    """
    Compares step 2 of two recorded runs at learning rate 0, one balanced and one of the tool alone. The definition is
    computed by autograd on the unpatched model, with the prices of step 1 in `checkpoint`.

    Args:
        means (`bool`): whether the definition weights micro-batches equally instead of tokens. For trainers that make
            micro-batches one by one, so that the step's number of tokens is not known in advance.
    """
    ours, theirs = ([torch.load(path) for path in sorted(run.glob("records/2-*.pt"))] for run in (balanced, plain))
    forwards = [inputs for rank in ours for inputs in rank["forwards"]]
    for inputs, other in zip(forwards, [inputs for rank in theirs for inputs in rank["forwards"]], strict=True):
        assert torch.equal(inputs["input_ids"], other["input_ids"]), "the runs were given different data"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prices = prices_of(base, checkpoint)
    top = base
    if (checkpoint / "adapter_config.json").is_file():
        from peft import PeftModel

        top = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    logits = {}
    for name in prices:
        router = base.get_submodule(name)
        router.register_forward_hook(lambda _, args, output, name=name: logits.update({name: output[0]}))
    counts = [int((inputs["input_ids"] != PAD).sum()) for inputs in forwards]
    for inputs, count in zip(forwards, counts):
        names = inputs.keys() & {"input_ids", "attention_mask", "position_ids"}
        top(**{name: inputs[name] for name in names}, use_cache=False)
        counted = (inputs["input_ids"] != PAD).reshape(-1)
        weight = 1 / (count * len(counts)) if means else 1 / sum(counts)
        term = sum((logits[name].softmax(-1)[counted] @ price).sum() for name, price in prices.items())
        (COEF * weight * term).backward()
    received, alone = ours[0]["gradients"], theirs[0]["gradients"]
    named = dict(top.named_parameters())
    added = torch.cat([(received[name] - alone[name]).reshape(-1) for name in received])
    declared = [
        named[name].grad if named[name].grad is not None else torch.zeros_like(named[name]) for name in received
    ]
    declared = torch.cat([gradient.reshape(-1) for gradient in declared])
    return Effective(
        float(added @ declared / (declared @ declared)),
        float((added - declared).norm() / declared.norm()),
        sum(counts),
        sum(inputs["input_ids"].numel() for inputs in forwards) - sum(counts),
    )


def assert_merged(base: Path, adapter: Path, merged: Path, *moved: str) -> None:
    """
    Asserts that the model in `merged` computes what `base` and `adapter` do, and chooses the same experts. Training
    must have moved its parameters whose names end in `moved`.
    """
    from peft import PeftModel

    plain, whole = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, merged))
    for ending in moved:
        changed = [name for name, p in whole.named_parameters() if not torch.equal(p, plain.get_parameter(name))]
        assert sum(name.endswith(ending) for name in changed) == SHAPE["num_hidden_layers"], ending
    adapted = PeftModel.from_pretrained(plain, adapter)
    ids = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        found, expected = (model.eval()(ids, output_router_logits=True) for model in (whole, adapted))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for logits, other in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits.topk(2).indices, other.topk(2).indices)


def prices_of(model, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the prices by router from the state file in `checkpoint`. Leaves `model` unpatched."""
    phb.patch(model, {"coef": COEF})
    balancer = phb.get_balancer(model)
    balancer.load(checkpoint)
    prices = {name: price.detach() for name, price in balancer.prices().items()}
    phb.unpatch(model)
    return prices


def log_of(folder: Path) -> list[dict]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]
