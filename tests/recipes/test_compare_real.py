"""recipes/compare, a real language model: a miniature of it by the command, and figures against naive ones."""

import json

import pytest
import torch
from comparison import harness, load_command, real
from transformers import LlamaConfig, LlamaForCausalLM

import hf_phibalance as phb
from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow

KEYS = ("input_ids", "attention_mask", "labels")
TEMPLATE = (
    "{% for m in messages %}{{ '<pad>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<pad>' }}{% endif %}"
)
PLANS = """
kind: real
output: {folder}/out
starts:
  new routers: {{model: "{folder}/moe"}}
  uneven: {{model: "{folder}/moe", steps: 2}}
defaults: {{steps: 8, rows: 2, learning_rate: 0.001, seeds: [0], portable: true}}
plans:
  new:
    starts: [new routers]
    methods:
      - {{label: none, method: none}}
      - {{label: built-in, method: none, built_in: true}}
      - {{label: both, coef: 0.01, bias_coef: 0.003, track: load}}
  uneven:
    starts: [uneven]
    methods: [{{label: none, method: none}}, {{label: Muon, coef: 0.01, muon: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and an upcycled model, both tiny."""
    folder = tmp_path_factory.mktemp("real")
    problems = make_splits(60, 1, 8)
    code = "def add{0}(a, b):\n    return a + b + {0}\n"
    rows = [
        {"task_id": n, "text": f"Add {n}.", "code": code.format(n), "test_list": [f"assert add{n}(1, 2) == {3 + n}"]}
        for n in range(1, 60)
    ]
    for name, of_name in {"gsm8k/train": problems["train"], "gsm8k/test": problems["test"], "mbpp/mbpp": rows}.items():
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in of_name))
    (folder / "data" / "wikitext2").mkdir()
    article = " = Town {0} = \n" + "the river {0} and the town\n" * 40
    (folder / "data" / "wikitext2" / "valid.txt").write_text("".join(article.format(n) for n in range(9)))
    tokenizer = train_tokenizer([row["question"] for row in problems["train"]] + ["<|endoftext|>"], 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    phb.upcycle(dense, experts=4).save_pretrained(folder / "moe")
    tokenizer.save_pretrained(folder / "moe")
    return folder


@pytest.fixture(scope="module", autouse=True)
def small():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HELD_OUT": 6, "TESTED": 4, "LONGEST_ANSWER": 6, "WINDOW": 16, "WINDOWS": 8}.items():
            patch.setattr(real, name, value)
        yield
    torch.set_num_threads(threads)


def test_the_command_runs_plans_on_a_real_model(folder, monkeypatch):
    path = folder / "plans.yaml"
    path.write_text(PLANS.format(folder=folder))
    command = load_command()
    monkeypatch.setattr(command, "execute", run_here)
    assert command.main([str(path), "--data", str(folder / "data")]) == 0
    output, (new, _) = harness.load_plans(path)
    results = harness.Results(output / "results.jsonl")
    none, built_in, both = [results.get(run) for run in new.runs()]
    before = results.get(next(new.runs()).reference)["metrics"]
    for record in (none, built_in, both):
        assert len(record["curve"]["loss"]) == 8 and 0 <= record["metrics"]["score"] <= 1
        assert record["metrics"]["loss"] < before["loss"]  # it learns
        assert record["metrics"]["domain_information"] > 0
    assert both["metrics"]["dropped_loss"] != both["metrics"]["loss"] and "dropped_loss" not in none["metrics"]
    assert none["curve"]["loss"][0] == both["curve"]["loss"][0] != none["curve"]["loss"][1]  # the same start and data
    table = (output / "new.md").read_text()
    assert "| both | 1 |" in table and (output / "new-new_routers.png").is_file()
    assert "| Muon | 1 |" in (output / "uneven.md").read_text()


def test_muon_takes_the_matrices_of_experts_one_by_one(folder):
    """Two steps move each matrix of an expert, and a router, as torch's Muon moves it alone, and embeddings as AdamW does."""
    model = real.Start(name="new", model=str(folder / "moe")).load(0, folder)
    layer, embeddings = model.model.layers[0].mlp, model.get_input_embeddings().weight
    gate_up, size = layer.experts.gate_up_proj, layer.experts.gate_up_proj.shape[1] // 2
    seen = {  # the moved matrices, in the model
        "gate": lambda: gate_up[1, :size],
        "up": lambda: gate_up[1, size:],
        "down": lambda: layer.experts.down_proj[3],
        "router": lambda: layer.gate.weight,
    }
    alone = {name: torch.nn.Parameter(view().detach().clone()) for name, view in seen.items()}
    table = torch.nn.Parameter(embeddings.detach().clone())
    whole = real.Muon(model, 0.01)
    parts = torch.optim.Muon(list(alone.values()), 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([table], 0.01, weight_decay=0.0)
    tokens = torch.arange(40).view(2, 20)
    for learning_rate in (0.01, 0.003):
        for optimizer in (whole, parts, adamw):
            optimizer.param_groups[0]["lr"] = learning_rate
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gate_up_grad = gate_up.grad[1].clone()
        alone["gate"].grad, alone["up"].grad = gate_up_grad[:size], gate_up_grad[size:]
        alone["down"].grad, alone["router"].grad = (
            layer.experts.down_proj.grad[3].clone(),
            layer.gate.weight.grad.clone(),
        )
        table.grad = embeddings.grad.clone()
        for optimizer in (whole, parts, adamw):
            optimizer.step()
    assert gate_up_grad.abs().max() > 0
    for name, view in seen.items():
        torch.testing.assert_close(view(), alone[name].data)
    torch.testing.assert_close(embeddings, table)


def test_figures_on_answers_are_those_of_rows_by_themselves(folder):
    """Loss, MaxVio and the MaxVio without a bias, against forwards of one row without padding."""
    corpus = real.prepare_data(str(folder / "data"), folder / "out")
    start = real.Start(name="new", model=str(folder / "moe"), corpus=corpus)
    run = real.Run(start=start, method={"coef": 0.0, "bias_coef": 0.003}, steps=0, rows=2, corpus=corpus)
    trainer = real.fit(run, real.load_data(corpus, folder / "out"), folder / "out")
    model, balancer = trainer.model, phb.get_balancer(trainer.model)
    balancer.set_biases({name: torch.tensor([0.5, 0.0, 0.0, -0.5]) for name in balancer.biases()})
    with_bias = real.on_answers(trainer)
    with balancer.without_bias():
        without = real.on_answers(trainer)
    total = count = 0
    loads_LE = torch.zeros(2, 4)
    rows = [example for batch in trainer.get_eval_dataloader() for example in zip(*(batch[key] for key in KEYS))]
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *args: chosen.append(args[2][2]))
    for ids, mask, labels in rows:
        chosen.clear()
        ids, labels = ids[mask.bool()][None], labels[mask.bool()]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        for layer, experts in enumerate(chosen):
            loads_LE[layer] += torch.bincount(experts.reshape(-1), minlength=4)
        for logit, label in zip(logits, labels[1:].tolist()):
            if label != -100:
                total, count = total - float(logit.log_softmax(-1)[label]), count + 1
    assert with_bias["loss"] == pytest.approx(total / count, rel=1e-3)
    max_vio_L = loads_LE.max(1).values / loads_LE.mean(1) - 1
    max_vio = float(max_vio_L.mean())
    assert with_bias["max_vio_global"] == pytest.approx(max_vio, abs=0.02)
    assert with_bias["max_vio_first"] == pytest.approx(float(max_vio_L[0]), abs=0.02)
    assert without["max_vio_global"] < max_vio - 0.2  # the bias above fills one expert
    assert real.on_answers(trainer) == with_bias  # it acts again


def test_steps_until_even():
    assert real.steps_until_even([0.9, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]) == 6  # 0.14 over steps 2 to 6
    assert real.steps_until_even([0.9] * 7) == 7 and real.steps_until_even([]) == 0


def run_here(jobs, output, workers, threads):
    for job in jobs:
        record = job.train(output)
        if record is not None:
            harness.append(output / "results.jsonl", {"key": job.key, "settings": job.settings, **record})
    return 0
