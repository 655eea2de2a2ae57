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
    assert both["metrics"]["dropped_loss"] > 0 and "dropped_loss" not in none["metrics"]
    assert none["curve"]["loss"][0] == both["curve"]["loss"][0] != none["curve"]["loss"][1]  # the same start and data
    table = (output / "new.md").read_text()
    assert "| both | 1 |" in table and (output / "new-new_routers.png").is_file()
    assert "| Muon | 1 |" in (output / "uneven.md").read_text()


def test_muon_takes_experts_one_by_one(folder):
    """A step moves each expert as torch's Muon moves that matrix alone, and embeddings as AdamW does."""
    model = real.Start(name="new", model=str(folder / "moe")).load(0, folder)
    experts, embeddings = model.model.layers[0].mlp.experts.down_proj, model.get_input_embeddings().weight
    alone = [torch.nn.Parameter(tensor.detach().clone()) for tensor in (experts[1], embeddings)]
    optimizers = [
        torch.optim.Muon(alone[:1], 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(alone[1:], 0.01, weight_decay=0.0),
    ]
    model(input_ids=torch.arange(40).view(2, 20), labels=torch.arange(40).view(2, 20)).loss.backward()
    alone[0].grad, alone[1].grad = experts.grad[1].clone(), embeddings.grad.clone()
    for optimizer in (real.Muon(model, 0.01), *optimizers):
        optimizer.step()
    assert alone[0].grad.abs().max() > 0
    torch.testing.assert_close(experts[1], alone[0])
    torch.testing.assert_close(embeddings, alone[1])


def run_here(jobs, output, workers):
    for job in jobs:
        record = job.train(output)
        if record is not None:
            harness.append(output / "results.jsonl", {"key": job.key, "settings": job.settings, **record})
    return 0
