"""Every recipe for a real model runs at tiny size for two steps. Also their launchers, memory and README."""

import gc
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_phibalance as phb
from hf_phibalance.hub import pictures
from hf_phibalance.routers import find_routers
from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow

RECIPES = ROOT / "recipes"
README = RECIPES / "README.md"
REPLICATION = RECIPES / "olmoe-1b-7b" / "README.md"
YAMLS = sorted(path.relative_to(RECIPES) for path in RECIPES.glob("*/*/*.yaml"))
MODELS = sorted({path.parts[0] for path in YAMLS})
VARIANTS = ("frozen-router", "none", "phibalance")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, scripts importable, no pictures and no garbage collection, which take longer than the training."""
    threads = torch.get_num_threads()
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        for name in ("plot_loads", "plot_curves"):
            patch.setattr(pictures, name, lambda *args, **kwargs: None)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture
def train_tiny(tmp_path, monkeypatch):
    """Runs `recipes/sft.py` with `--tiny` in this process; returns the trainer, its weights before, and the summary."""
    import trl

    sft = importlib.import_module("sft")
    seen = []

    class Seen(trl.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
            seen.append(self)

    monkeypatch.setattr(trl, "SFTTrainer", Seen)
    monkeypatch.chdir(ROOT)

    def run(*options):
        folder = tmp_path / "out"
        arguments = [*map(str, options), "--tiny", "--output_dir", str(folder), "--disable_tqdm", "true"]
        sft.main(*sft.parse(arguments))
        return seen[-1], seen[-1].before, json.loads((folder / "metrics.json").read_text())

    return run


def moved(trainer, before):
    """Names of the parameters that training changed."""
    return {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}


def of_routers(trainer, names):
    """Those of `names` that lie in a router."""
    routers = [site.name for site in find_routers(trainer.model)]
    return {name for name in names if any(re.search(rf"{re.escape(router)}\b", name) for router in routers)}


PAPER = {"lora_r": 8, "lora_alpha": 32, "learning_rate": 5e-5, "global_batch_size": 18, "num_train_epochs": 3}


def test_recipes_are_complete():
    names = itertools.product(MODELS, ("gsm8k", "humaneval"), VARIANTS)
    assert {str(path) for path in YAMLS} == {f"{'/'.join(name)}.yaml" for name in names} and len(MODELS) == 7


@pytest.mark.parametrize("model", MODELS)
def test_settings_are_those_of_the_paper(model):
    hub_names = set()
    for task in ("gsm8k", "humaneval"):
        recipes = {name: yaml.safe_load((RECIPES / model / task / f"{name}.yaml").read_text()) for name in VARIANTS}
        for name, recipe in recipes.items():
            assert {key: recipe[key] for key in PAPER} == PAPER
            assert recipe["use_peft"] is True and recipe["architecture"] == f"{model}/config.json"
            assert recipe["task"] == {"gsm8k": "gsm8k", "humaneval": "mbpp"}[task]
            assert recipe["output_dir"] == f"results/{model}/{task}/{name}"
            hub_names.add(recipe["model_name_or_path"])
        differing = {"balance", "coef", "router_policy", "output_dir"}
        common = [{key: recipe[key] for key in recipe.keys() - differing} for recipe in recipes.values()]
        assert common[0] == common[1] == common[2]
    assert len(hub_names) == 1


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_recipe(path, train_tiny):
    trainer, before, summary = train_tiny("--config", RECIPES / path)
    model, _, variant = path.parts[0], path.parts[1], path.stem
    declared = json.loads((RECIPES / model / "config.json").read_text())
    base = trainer.model.get_base_model()
    assert base.config.model_type == declared["model_type"]
    if declared["model_type"] != "deepseek":
        assert type(base).__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[declared["model_type"]]
    for key in ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_method", "first_k_dense_replace"):
        assert getattr(base.config, key, None) == declared.get(key, getattr(base.config, key, None)), key

    balancer = phb.get_balancer(trainer.model)
    assert balancer.steps == trainer.state.global_step == 2
    assert balancer.config.coef == (0.01 if variant == "phibalance" else 0.0) and balancer.config.bias_coef == 0.0
    assert (summary["balance"] is not None) == (variant == "phibalance")
    assert all(load.sum() > 0 for load in balancer.loads().values())

    changed = moved(trainer, before)
    routers = of_routers(trainer, changed)
    assert bool(routers) == (variant != "frozen-router")
    assert changed - routers and all("lora_" in name for name in changed)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained >= changed and bool(of_routers(trainer, trained)) == (variant != "frozen-router")
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.0)
    is_gsm8k = path.parts[1] == "gsm8k"
    assert (summary["exact_match"]["trained"] is not None) == is_gsm8k


@pytest.mark.parametrize("model, router", [*((model, "full") for model in MODELS), ("olmoe-1b-7b", "frozen")])
def test_full_fine_tuning(model, router, train_tiny):
    options = ["--use_peft", "false", "--router_policy", router, "--dtype", "float32", "--learning_rate", "1e-5"]
    trainer, before, _ = train_tiny("--config", RECIPES / model / "gsm8k" / "phibalance.yaml", *options)
    changed = moved(trainer, before)
    assert of_routers(trainer, changed) == (of_routers(trainer, before) if router == "full" else set())
    assert len(changed - of_routers(trainer, before)) > 0.9 * len(before.keys() - of_routers(trainer, before))
    assert phb.get_balancer(trainer.model).config.coef == 0.01


@pytest.mark.parametrize("policy, targets", [("full", "experts"), ("lora", "attention"), ("router-only", None)])
def test_other_adapters(policy, targets, train_tiny):
    # a YAML value cannot be unset, so this one has none
    recipe = yaml.safe_load((RECIPES / "mixtral-8x7b/gsm8k/phibalance.yaml").read_text())
    options = f"--model_name_or_path x --use_peft --learning_rate 1e-2 --router_policy {policy}".split()
    options += ["--architecture", recipe["architecture"], *(["--lora_targets", targets] if targets else [])]
    trainer, before, _ = train_tiny(*options)
    changed = moved(trainer, before)
    routers, others = of_routers(trainer, changed), changed - of_routers(trainer, changed)
    assert routers and bool(others) == (policy != "router-only")
    assert all(("experts" if targets == "experts" else "self_attn") in name for name in others)
    assert any("modules_to_save" in name for name in routers) == (policy == "full")


def test_unknown_keys_are_refused(train_tiny, tmp_path):
    text = (RECIPES / "mixtral-8x7b/gsm8k/none.yaml").read_text()
    (tmp_path / "stale.yaml").write_text(text + "lora_rank: 4\n")
    with pytest.raises(ValueError, match="lora_rank"):
        train_tiny("--config", tmp_path / "stale.yaml")


def test_chat_template_is_used_for_training_and_examination(monkeypatch, train_tiny):
    """The same problems as chats: the prompt of the exact match is rendered as in training, once."""
    from hf_phibalance import models

    train_tokenizer = models.train_tokenizer

    def with_template(*args, **kwargs):
        tokenizer = train_tokenizer(*args, **kwargs)
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.role }}>{{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant>{% endif %}"
        )
        return tokenizer

    monkeypatch.setattr(models, "train_tokenizer", with_template)
    _, _, summary = train_tiny("--config", RECIPES / "mixtral-8x7b/gsm8k/phibalance.yaml")
    assert re.fullmatch(r"user>Question: .*\nAnswer:\nassistant>", summary["example_prompt"], re.DOTALL)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_is_understood(path):
    kinds = {"fsdp2": "FSDP", "zero3": "DEEPSPEED", "single_gpu": "NO"}
    declared = load_config_from_file(str(path))
    assert declared.distributed_type.value == kinds.get(path.stem, "MULTI_GPU")
    known = launch_command_parser()
    for prefix, options in (("fsdp", declared.fsdp_config), ("", declared.deepspeed_config)):
        for key in options:
            assert key.startswith(prefix) and hasattr(known.parse_args(["x"]), key), key
    args, _, _ = _validate_launch_command(known.parse_args(["--config_file", str(path), "x"]))
    assert args.num_processes == {"single_gpu": 1, "cpu_2_processes": 2}.get(path.stem, 6)
    assert (args.use_fsdp, args.use_deepspeed) == (path.stem == "fsdp2", path.stem == "zero3")
    assert args.fsdp_version == 2 if path.stem == "fsdp2" else True
    assert args.zero_stage == 3 if path.stem == "zero3" else True


PUBLISHED = {  # billions of parameters, as their authors give them
    "mixtral-8x7b": 46.7,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
    "olmoe-1b-7b": 6.9,
    "deepseek-moe-16b": 16.4,
    "deepseek-v2-lite": 15.7,
    "moonlight-16b-a3b": 16.0,
}


@pytest.fixture(scope="module")
def memory(quick):
    return importlib.import_module("memory")


def test_architectures_have_the_published_size(memory):
    from hf_phibalance.models import register_deepseek_moe

    register_deepseek_moe()
    assert sorted(memory.MODELS) == MODELS == sorted(PUBLISHED)
    for model, billions in PUBLISHED.items():
        fields = json.loads((RECIPES / model / "config.json").read_text())
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            total = memory.count(AutoModelForCausalLM.from_config(config))
        assert round(total / 1e9, 1) == billions, model


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_state_is_what_lies_in_memory(full, memory, train_tiny, monkeypatch):
    """Bytes of a really trained miniature, whose base is bf16 with LoRA as in the recipes."""
    import miniature

    build = miniature.build_miniature
    sizes = []

    def build_and_measure(architecture, tokenizer):
        model = build(architecture, tokenizer)
        fields = {key: value for key, value in model.config.to_dict().items() if hasattr(type(model.config), key)}
        sizes.append(memory.measure({**fields, "model_type": "mixtral"}))
        return model if full else model.to(torch.bfloat16)

    monkeypatch.setattr(miniature, "build_miniature", build_and_measure)
    options = ["--use_peft", "false", "--router_policy", "full"] if full else []
    trainer, _, _ = train_tiny("--config", RECIPES / "mixtral-8x7b/gsm8k/phibalance.yaml", *options)
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    moments = sum(
        tensor.numel() * tensor.element_size()
        for state in trainer.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    assert weights + gradients + moments == memory.state_bytes(sizes[0], full)


def test_sharding_divides_the_state(memory):
    size = memory.Size(total=1000, active=500, adapters=10, block=100, layers=2, hidden=8, vocab=32)
    assert memory.state_bytes(size, full=False) == 2000 + 160
    assert memory.state_bytes(size, full=True) == 16_000
    assert memory.state_bytes(size, full=True, processes=4) == 4000 + 200
    assert memory.activation_bytes(size, rows=3, length=5) == 15 * (2 * 8 * 2 + 32 * 10)


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


TRAININGS = [*commands(README), *(line for line in commands(REPLICATION) if "launch" in line)]


@pytest.mark.parametrize("command", TRAININGS, ids=lambda command: command.replace("recipes/", "")[-60:])
def test_command_of_the_readme(command, train_tiny, tmp_path):
    words = shlex.split(command)
    if "path/to/gsm8k" in words:
        for split, rows in make_splits(16, 4, 4).items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words[words.index("path/to/gsm8k")] = str(tmp_path)
    if "cpu_2_processes" in command:  # really started; what the other launchers do is in test_launch.py
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        started = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        started += [*words[2:], "--output_dir", str(tmp_path / "two")]
        done = subprocess.run(started, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Training with φ-balanced routers") == 1
        assert (tmp_path / "two" / "metrics.json").is_file()
        assert [*(tmp_path / "two").glob("checkpoint-*/rng_state_1.pth")]
        return
    if words[:2] == ["accelerate", "launch"]:
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        words = ["python", args.training_script, *args.training_script_args]
    assert words[:2] == ["python", "recipes/sft.py"]
    trainer, before, _ = train_tiny(*(word for word in words[2:] if word != "--tiny"))
    assert trainer.state.global_step == 2 and moved(trainer, before)


def test_every_folder_and_launcher_is_in_the_readme():
    text = README.read_text()
    for name in [*MODELS, *VARIANTS, *(path.stem for path in (RECIPES / "accelerate_configs").glob("*.yaml"))]:
        assert f"`{name}`" in text or f"{name}.yaml" in text, name


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "deepseek-moe-16b"])
def test_memory_table_of_the_readme(model, memory):
    written = re.search(r"<!-- memory -->\n(.*)\n<!-- /memory -->", README.read_text(), re.DOTALL)[1].splitlines()
    table = memory.table([model], processes=6, rows=3, length=1024).splitlines()
    assert table[:2] == written[:2] and table[2] in written and len(written) == 2 + len(MODELS)


# ---------------------------------------------------------------------- the replication of OLMoE's Table 7


@pytest.mark.parametrize(
    ("row", "method", "coef", "bias_coef"),
    [("loss", "pooled", 0.01, 0), ("off", "phi", 0, 0), ("price", "phi", 0.01, 0), ("both", "phi", 0.01, 0.0003)],
)
def test_rows_of_table_7(row, method, coef, bias_coef, train_tiny):
    (command,) = (line for line in commands(REPLICATION) if line.endswith(f"--output_dir results/table7/{row}"))
    trainer, before, summary = train_tiny(*shlex.split(command)[2:])
    config = phb.get_balancer(trainer.model).config
    assert (config.method, config.coef, config.bias_coef) == (method, coef, bias_coef)
    assert trainer.model.config.output_router_logits is False and not trainer.aux_loss_enabled
    assert of_routers(trainer, moved(trainer, before)) and summary["exact_match"]["trained"] is not None


def test_table_7_has_the_batch_of_its_authors():
    recipe = yaml.safe_load((REPLICATION.parent / "table7.yaml").read_text())
    assert (recipe["global_batch_size"], recipe["num_train_epochs"], recipe["test_problems"]) == (128, 2, 1319)
    assert recipe["global_batch_size"] % (8 * recipe["per_device_train_batch_size"]) == 0


def test_evaluations_of_table_7_are_understood():
    from trl import TrlParser

    spec = importlib.util.spec_from_file_location("evaluate_recipe", RECIPES / "evaluate.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    lines = [shlex.split(line) for line in commands(REPLICATION) if "recipes/evaluate.py" in line]
    parsed = [TrlParser(recipe.Arguments).parse_args_and_config(words[2:])[0] for words in lines]
    assert [args.revision for args in parsed] == ["main", "main", "load-balancing"]
    assert len({args.output_path for args in parsed}) == 3


def test_memory_of_table_7(memory):
    assert memory.table(["olmoe-1b-7b"], processes=8, rows=4, length=1024) in REPLICATION.read_text()
