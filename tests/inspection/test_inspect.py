"""`phibalance inspect`: counts against a naive loop, figures against their definitions and simulation, and the command."""

import gzip
import importlib.util
import json
import math
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from paths import DATA
from peft import LoraConfig, get_peft_model
from tiny import FIRST_PLAIN_ID, SHRINK, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import hf_phibalance as phb
from hf_phibalance import cli
from hf_phibalance.inspection.census import (
    RouterCensus,
    balance_figures,
    chance_figures,
    design_effect,
    inspect_model,
    lift,
    mutual_information,
    mutual_information_bias,
    specialisation_figures,
)
from hf_phibalance.inspection.page import colour_step, html_report, nice_ticks
from hf_phibalance.inspection.texts import Domain, TextStream, leading_tokens, parse_domains
from hf_phibalance.maths.metrics import cv, gini, normalised_entropy


SEQ_LEN = 12


def words(count, first=FIRST_PLAIN_ID, last=SHRINK["vocab_size"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(first, last, (count,), generator=generator).tolist())


def make_tokenizer(bos=False):
    """One token per word, `w3` to `w127`."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(FIRST_PLAIN_ID, SHRINK["vocab_size"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture
def texts(tmp_path):
    """Two domains of uneven documents over different halves of the vocabulary; words of `--texts` and their tokens."""
    rows = [words(length, last=66, seed=length) for length in (3, 30, 7, 1, 12, 25, 11)]
    (tmp_path / "low.jsonl").write_text("".join(json.dumps({"id": "x", "body": row}) + "\n" for row in rows))
    long = words(80, first=64)
    (tmp_path / "high.txt").write_text(long.replace(" w9", "\nw9"))

    def ids(text):
        return [int(word[1:]) for word in text.split()]

    documents = {"low": [ids(row) for row in rows], "high": [ids(long)]}
    return [f"low={tmp_path}/low.jsonl", f"high={tmp_path}/high.txt"], documents


def domains_of(texts):
    return parse_domains(texts[0], ["low=body"])


def cut(documents, room):
    return [document[i : i + room] for document in documents for i in range(0, len(document), room)]


def softmax_choice(model, logits):
    return torch.softmax(logits.float(), -1).topk(2, -1).indices


def logits_choice(model, logits):
    return logits.topk(2, -1).indices


def grouped_choice(model, logits, layer):
    """DeepSeek-V3: sigmoid scores plus bias, the two best of four groups by the sum of their two best, top-2 in those."""
    scores = torch.sigmoid(logits.float()) + model.model.layers[layer].mlp.gate.e_score_correction_bias
    groups = scores.view(len(scores), 4, 2).topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(groups).scatter(1, groups.topk(2, -1).indices, 1.0).repeat_interleave(2, -1)
    return scores.masked_fill(kept == 0, -math.inf).topk(2, -1).indices


NAIVE = {
    "mixtral": softmax_choice,
    "qwen3_moe": softmax_choice,
    "dbrx": softmax_choice,  # the choice is made in the parent module, and not returned
    "gpt_oss": logits_choice,  # top-k first, then softmax
    "llama4_text": logits_choice,  # returns no choice
    "deepseek_v3": grouped_choice,
}


def with_bias(model):
    """Gives every selection bias of the family a value that changes the choice."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def naive(model, choose, sequences, prefix=()):
    """Counts and confidence by layer, from one unpadded forward per sequence and the logits that transformers records."""
    counts, confidence = {}, {}
    for ids in sequences:
        inputs = torch.tensor([[*prefix, *ids]])
        recorded = model.model if model.config.model_type != "dbrx" else model.transformer
        logits = recorded(inputs, output_router_logits=True).router_logits
        first_moe = model.config.num_hidden_layers - len(logits)
        for layer, layer_logits in enumerate(logits):
            layer_logits = layer_logits.reshape(-1, layer_logits.shape[-1])[len(prefix) :]
            where = (first_moe + layer,) if choose is grouped_choice else ()
            chosen = choose(model, layer_logits, *where)
            z = layer_logits.double()
            sigmoid = model.config.model_type in ("deepseek_v3", "llama4_text")
            p = torch.sigmoid(z) / torch.sigmoid(z).sum(-1, keepdim=True) if sigmoid else torch.softmax(z, -1)
            for row, own in zip(chosen.tolist(), p):
                for expert in row:
                    counts.setdefault(layer, [0] * 8)[expert] += 1
                figures = [own.max(), own[row].sum(), -(own * own.log2()).sum()]
                total = confidence.setdefault(layer, [0.0, 0.0, 0.0])
                confidence[layer] = [a + float(b) for a, b in zip(total, figures)]
    return counts, confidence


# ---------------------------------------------------------------------- counting


@pytest.mark.parametrize("model_type", NAIVE)
def test_counts_are_those_of_a_naive_loop(model_type, texts):
    """Padded batches of several sequences against one unpadded sequence at a time."""
    model = with_bias(tiny_model(model_type))
    found = inspect_model(model, make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN, batch_size=3)
    for index, documents in enumerate(texts[1].values()):
        counts, confidence = naive(model, NAIVE[model_type], cut(documents, SEQ_LEN))
        assert len(found.layers) == len(counts) >= 2
        for layer, (expected, sums) in enumerate(zip(counts.values(), confidence.values())):
            assert found.layers[layer].counts[index].tolist() == expected, found.layers[layer].name
            torch.testing.assert_close(found.layers[layer].confidence[index].tolist(), sums, rtol=1e-5, atol=0)
    tokens = {name: sum(map(len, documents)) for name, documents in texts[1].items()}
    assert {name: read["tokens"] for name, read in found.domains.items()} == tokens
    assert found.layers[0].tokens().tolist() == list(tokens.values())


def test_native_bias_is_part_of_the_choice(texts):
    plain = inspect_model(tiny_model("deepseek_v3"), make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN)
    biased = inspect_model(with_bias(tiny_model("deepseek_v3")), make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN)
    assert not torch.equal(plain.layers[0].counts, biased.layers[0].counts)
    assert biased.model["selection_bias"] == "the family's own"


def test_special_tokens_are_fed_but_not_counted(texts):
    model, tokenizer = tiny_model("mixtral"), make_tokenizer(bos=True)
    assert leading_tokens(tokenizer) == [1]
    found = inspect_model(model, tokenizer, domains_of(texts), seq_len=SEQ_LEN + 1, batch_size=4)
    for index, documents in enumerate(texts[1].values()):
        counts, _ = naive(model, softmax_choice, cut(documents, SEQ_LEN), prefix=[1])
        assert [layer.counts[index].tolist() for layer in found.layers] == list(counts.values())
    assert any("special tokens" in note for note in found.notes)


def test_batches_and_repetition_do_not_change_the_counts(texts):
    model = tiny_model("mixtral")
    runs = [
        inspect_model(model, make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN, batch_size=batch_size)
        for batch_size in (1, 5, 5)
    ]
    for layer, other in zip(runs[0].layers, runs[1].layers):
        assert torch.equal(layer.halves, other.halves)
        assert layer.halves.sum(-1).min() > 0  # both halves have something
    assert runs[1].to_dict() == runs[2].to_dict()


def test_selection_bias_of_a_balanced_checkpoint_counts(tmp_path, texts):
    model = phb.patch(tiny_model("mixtral"), {"coef": 0.0, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    state = balancer.state_dict()
    for name, value in state.items():
        if name.endswith(".bias"):
            value.copy_(torch.linspace(-1, 1, 8))
    balancer.load_state_dict(state)
    model.save_pretrained(tmp_path / "model")
    tokenizer, domains = make_tokenizer(), domains_of(texts)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    hooks = hooks_of(loaded)
    found = inspect_model(loaded, tokenizer, domains, seq_len=SEQ_LEN)
    assert hooks_of(loaded) == hooks  # the patch is as it was
    assert found.model["selection_bias"] == "phi_balance.safetensors"
    with phb.get_balancer(loaded).evaluation(), torch.no_grad():
        for ids in [ids for documents in texts[1].values() for ids in cut(documents, SEQ_LEN)]:
            loaded(torch.tensor([ids]), use_cache=False)
        expected = phb.get_balancer(loaded).eval_metrics(per_layer=99)
    for layer in found.layers:
        figures = found.layer_figures(layer)["overall"]
        assert figures["max_vio"] == pytest.approx(expected[f"max_vio/{layer.name}"], rel=1e-5)
    plain = inspect_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer, domains, seq_len=SEQ_LEN
    )
    assert plain.model["selection_bias"] == "none"
    assert not torch.equal(plain.layers[0].counts, found.layers[0].counts)


def hooks_of(model):
    return [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(texts, fails):
    model = tiny_model("deepseek_v3").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, attributes, hooks = model.config.to_dict(), set(vars(model)), hooks_of(model)
    requires = [p.requires_grad for p in model.parameters()]

    def on_batch(stream):
        assert hooks_of(model) != hooks
        if fails:
            raise KeyboardInterrupt

    def run():
        inspect_model(model, make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN, on_batch=on_batch)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert hooks_of(model) == hooks and model.config.to_dict() == config and set(vars(model)) == attributes
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == requires
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


def test_nothing_kept_grows_with_the_text():
    """The census of 64 times as many tokens holds tensors of the same sizes."""
    model = tiny_model("mixtral")

    def kept(repeats):
        census = RouterCensus(model, domains=2)
        ids = torch.randint(3, 128, (4, 8))
        with census.attached(), torch.no_grad():
            for _ in range(repeats):
                with census.counting(0, torch.ones(4, 8, dtype=torch.bool), torch.tensor([0, 1, 0, 1])):
                    census.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        held = [value for entry in vars(census).values() for value in (entry if isinstance(entry, list) else [entry])]
        assert census.layers()[0].counts.sum() == repeats * 4 * 8 * 2
        return sorted(tuple(value.shape) for value in held if isinstance(value, torch.Tensor))

    once = kept(1)
    assert kept(64) == once and (2, 2, 8) in once


def test_text_is_streamed(tmp_path):
    """A megabyte on one line, and in 15,000 rows, is read in far less memory."""

    class Letters:
        bos_token_id = eos_token_id = cls_token_id = sep_token_id = None

        def __call__(self, text, **kwargs):
            return {"input_ids": list(text.encode())}

    (tmp_path / "line.txt").write_text("x" * 1_000_000)
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "y" * 68}) + "\n") * 15_000)
    domain = Domain("all", (tmp_path / "line.txt", tmp_path / "rows.jsonl"), ("text",))
    stream = TextStream(domain, Letters(), 64, max_tokens=2_000_000)
    tracemalloc.start()
    shares = [stream.progress for _ in stream.batches(8)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.tokens == 2_000_000 and stream.documents == 1 + math.ceil(1_000_000 / 68)
    assert peak < 4_000_000  # a list of all ids alone would take 16
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1.0


# ---------------------------------------------------------------------- figures


def draw(logits_E, top_k, tokens, generator):
    """Counts of `tokens` independent tokens that each take `top_k` distinct experts, `(E,)`."""
    noise = -torch.rand(tokens, len(logits_E), generator=generator, dtype=torch.float64).log().log1p().neg()
    gumbel = -(-torch.rand(noise.shape, generator=generator, dtype=torch.float64).log()).log()
    return torch.bincount((logits_E + gumbel).topk(top_k, -1).indices.flatten(), minlength=len(logits_E))


def test_mutual_information_is_the_sum_over_cells():
    counts = torch.tensor([[5, 0, 3, 9], [1, 7, 3, 0], [2, 2, 2, 2]])
    total, expected = int(counts.sum()), 0.0
    for d in range(3):
        for e in range(4):
            joint = int(counts[d, e]) / total
            if joint:
                apart = int(counts[d].sum()) / total * int(counts[:, e].sum()) / total
                expected += joint * math.log2(joint / apart)
    assert float(mutual_information(counts)) == pytest.approx(expected, rel=1e-12)
    assert float(mutual_information(torch.eye(8) * 5)) == pytest.approx(3.0)  # disjoint experts: all of log2 8
    assert float(mutual_information(torch.tensor([[3, 6], [5, 10]]))) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(lift(torch.tensor([[3, 1], [1, 3]])), torch.tensor([[1.5, 0.5], [0.5, 1.5]]).double())


def test_bias_of_mutual_information_is_that_of_miller_and_madow():
    counts = torch.tensor([[50, 30, 20, 0], [40, 40, 20, 0]])  # the last expert never occurs
    cells, rows, columns, total = 6, 2, 3, 200
    expected = (cells - rows - columns + 1) / (2 * total * math.log(2))  # of H(D) + H(E) - H(D, E)
    assert mutual_information_bias(counts, top_k=1) == pytest.approx(expected)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_bias_of_mutual_information_is_what_equal_domains_show(top_k, spread):
    generator = torch.Generator().manual_seed(0)
    logits = torch.linspace(-spread, spread, 8, dtype=torch.float64)
    found, biases = [], []
    for _ in range(300):
        counts = torch.stack([draw(logits, top_k, tokens, generator) for tokens in (400, 150)])
        found.append(float(mutual_information(counts)))
        biases.append(mutual_information_bias(counts, top_k))
    assert sum(found) == pytest.approx(sum(biases), rel=0.1)  # standard error 3 %


def test_chance_figures_are_what_uniform_choices_show():
    generator = torch.Generator().manual_seed(0)
    experts, top_k, tokens = 16, 4, 500
    drawn = torch.stack([draw(torch.zeros(experts).double(), top_k, tokens, generator) for _ in range(300)])
    expected = chance_figures(experts, top_k, tokens)
    assert float(cv(drawn).square().mean().sqrt()) == pytest.approx(expected["cv"], rel=0.05)
    assert float(gini(drawn).mean()) == pytest.approx(expected["gini"], rel=0.05)
    lacking = 1 - normalised_entropy(drawn.double()).mean()
    assert float(lacking) == pytest.approx(1 - expected["normalised_entropy"], rel=0.05)


def test_dependence_within_sequences_is_measured():
    """Sequences of 20 equal tokens are worth 20 times less, and domains that do not differ stay within the noise."""
    generator, zeros = torch.Generator().manual_seed(0), torch.zeros(8).double()
    effects, information, noise = [], [], 0
    for _ in range(60):
        halves = 20 * torch.stack([torch.stack([draw(zeros, 2, 40, generator) for _ in range(3)]) for _ in range(2)])
        effects.append(design_effect(halves[:, 0], 2))
        figures = specialisation_figures(halves, 2)
        information.append(figures["plug_in"] - figures["bias"])
        noise += figures["noise"]
        assert figures["bias"] > 5 * figures["bias_if_independent"]
    assert sum(effects) / 60 == pytest.approx(20, rel=0.2)
    assert abs(sum(information)) / 60 < 0.1 * figures["bias"] + 2e-3
    assert noise >= 50
    independent = torch.stack([draw(zeros, 2, 4000, generator) for _ in range(2)])
    assert design_effect(independent, 2) < 3


def test_noise_and_dead_experts_are_marked():
    even = torch.tensor([[503, 497, 500, 500], [499, 501, 498, 502]])
    figures = balance_figures(even, top_k=1)
    assert figures["noise"] == {
        "max_vio": True, "gini": True, "cv": True, "normalised_entropy": True, "dead_experts": False
    }  # fmt: skip
    uneven = torch.tensor([[900, 60, 39, 1], [900, 60, 39, 1]])
    figures = balance_figures(uneven, top_k=1)
    assert not any(figures["noise"].values())
    assert figures["dead"] == [3] and figures["dead_experts"] == 1
    assert figures["max_vio"] == pytest.approx(2.6) and figures["chance"]["max_vio"] < 0.1
    few = balance_figures(torch.tensor([[2, 1, 0, 0], [0, 1, 1, 0]]), top_k=1)
    assert few["dead_experts"] == 1 and few["noise"]["dead_experts"]


def test_specialists_are_the_experts_that_a_domain_prefers(tmp_path):
    """Two domains of a few words each."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    (tmp_path / "a.txt").write_text(words(600, last=8))
    (tmp_path / "b.txt").write_text(words(600, first=123))
    found = inspect_model(
        model,
        make_tokenizer(),
        parse_domains([f"a={tmp_path}/a.txt", f"b={tmp_path}/b.txt"]),
        seq_len=20,
    )
    counts = found.layers[0].counts
    for index, name in enumerate("ab"):
        best = found.specialists(name, top=3)
        assert best and best == sorted(best, key=lambda entry: -entry["bits"])
        for entry in best:
            share = counts[index, entry["expert"]] / 600
            assert entry["share"] == pytest.approx(float(share))
            assert entry["share_elsewhere"] == pytest.approx(float(counts[1 - index, entry["expert"]] / 600))
            assert entry["share"] > entry["share_elsewhere"]
    figures = specialisation_figures(found.layers[0].halves, 2)
    assert figures["max_bits"] == pytest.approx(1.0) and 0 < figures["mutual_information"] < figures["plug_in"]


# ---------------------------------------------------------------------- texts


def test_paths_of_every_kind(tmp_path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in ("src/b.py", "src/a.md", "src/deep/c.txt", "src/image.png", "notes.rst"):
        (tmp_path / name).write_text("w3")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('"w4 w5"\n')

    def names(*texts):
        found = {d.name: [str(p.relative_to(tmp_path)) for p in d.files] for d in parse_domains(texts)}
        again = {d.name: [str(p.relative_to(tmp_path)) for p in d.files] for d in parse_domains(texts)}
        assert again == found
        return {name: sorted(files) for name, files in found.items()}

    assert names(f"code={tmp_path}/src") == {"code": ["src/a.md", "src/b.py", "src/deep/c.txt"]}
    assert names(f"x={tmp_path}/src/*.py", f"x={tmp_path}/notes.rst") == {"x": ["notes.rst", "src/b.py"]}
    assert names(f"x={tmp_path}/**/*.txt", f"{tmp_path}/rows.jsonl.gz") == {
        "x": ["src/deep/c.txt"],
        "rows": ["rows.jsonl.gz"],
    }
    (rows,) = parse_domains([f"{tmp_path}/rows.jsonl.gz"])
    assert list(TextStream(rows, make_tokenizer(), 8)) == [[4, 5]]


def test_bad_rows_and_letters_are_skipped_and_told(tmp_path, texts):
    rows = ['{"text": "w3 w4"}', "", "not json", '{"other": "w5"}', '{"text": ""}', '{"text": "w6"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "latin.txt").write_bytes(b"w3 caf\xe9 w4")
    domains = parse_domains([f"a={tmp_path}/rows.jsonl", f"b={tmp_path}/latin.txt"])
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains)
    assert found.domains["a"] == {"tokens": 3, "sequences": 2, "documents": 2, "files": 1, "files_read": 1}
    assert found.domains["b"]["tokens"] == 3
    assert any("2 rows of a" in note for note in found.notes) and any("latin.txt" in note for note in found.notes)


def test_max_tokens_is_exact(texts):
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN, max_tokens=50)
    assert [read["tokens"] for read in found.domains.values()] == [50, 50]
    documents = texts[1]["high"]
    counts, _ = naive(tiny_model("mixtral"), softmax_choice, cut([documents[0][:50]], SEQ_LEN))
    assert [layer.counts[1].tolist() for layer in found.layers] == list(counts.values())


@pytest.mark.parametrize(
    "words, message",
    [
        (["x=missing.txt"], "no such file"),
        (["x={tmp}/empty"], "no file in that folder ends in"),
        (["=a.txt"], "lacks a name"),
        (["x="], "lacks a path"),
        (["x={tmp}/binary.bin"], "zero bytes"),
        (["x={tmp}/rows.jsonl"], "--field"),
        (["x={tmp}/rows.jsonl", "--field", "y=question"], "for no domain"),
        (["x={tmp}/rows.jsonl", "--field", "wrong"], "'wrong'.*question, answer"),
        (["x={tmp}/broken.jsonl"], "broken.jsonl, first row"),
        (["x={tmp}/a.txt", "--batch_size", "0"], "`--batch_size` is 0"),
        (["x={tmp}/a.txt", "--html", "{tmp}"], "is a folder"),
        (["x={tmp}/a.txt", "--seq_len", "65"], "at most 64"),
        (["x={tmp}/none.txt"], "no text in domain x"),
        (["x={tmp}/numbers.jsonl", "--field", "n"], "no text in field 'n'"),
    ],
)
def test_bad_input_is_explained(tmp_path, saved, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("w3 w4")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "rows.jsonl").write_text('{"question": "w3", "answer": "w4"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"n": 3, "body": "w3"}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    assert cli.main(["inspect", saved, "--texts", *(word.format(tmp=tmp_path) for word in words)]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err.replace("\n", " ")), captured.err
    assert not captured.out


def test_models_that_cannot_be_inspected(texts):
    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="nothing to inspect: LlamaForCausalLM has no router"):
        inspect_model(dense, make_tokenizer(), domains_of(texts))
    with pytest.raises(ValueError, match="product keys"):
        inspect_model(tiny_model("doge"), make_tokenizer(), domains_of(texts))
    with pytest.raises(ValueError, match=r"token 1\d\d, but the model has a vocabulary of 100"):
        inspect_model(tiny_model("mixtral", vocab_size=100), make_tokenizer(), domains_of(texts))
    broken = tiny_model("mixtral")
    broken.model.layers[0].mlp.gate.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate' are not finite"):
        inspect_model(broken, make_tokenizer(), domains_of(texts))


# ---------------------------------------------------------------------- the command and its reports


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("qwen3_moe").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_command(tmp_path, saved, texts, capsys):
    out = tmp_path / "new" / "report"
    words = ["inspect", saved, "--texts", *texts[0], "--field", "body", "--seq_len", "12"]
    assert cli.main([*words, "--json", f"{out}.json", "--html", f"{out}.html"]) == 0
    shown = capsys.readouterr().out
    for text in ("MaxVio", "low", "high", "layer 1", "layer 2", "qwen3_moe"):
        assert text in shown
    written = json.loads(Path(f"{out}.json").read_text())
    expected = inspect_model(tiny_model("qwen3_moe"), make_tokenizer(), domains_of(texts), seq_len=12)
    expected.model["name"] = saved
    assert "transformers" in written.pop("versions")
    assert written == json.loads(json.dumps(expected.to_dict(top=5)))
    assert written["layers"][0]["counts"]["low"] == expected.layers[0].counts[0].tolist()
    page = Path(f"{out}.html").read_text()
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)  # nothing from outside the file
    assert page.count('<svg class="heat"') == 3 + 2 and page.count('<svg class="lines"') == 4
    assert "--texts" in page and str(tmp_path) not in page
    figures = written["layers"][0]["figures"]["overall"]
    assert f"{figures['gini']:.3f}" in page and f"{figures['gini']:.3f}" in shown


def test_json_to_standard_output_is_json_alone(saved, texts, capsys):
    assert cli.main(["inspect", saved, "--texts", *texts[0], "--field", "body", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["domains"]["low"]["tokens"] == 89
    assert "MaxVio" in captured.err


def test_command_on_an_adapter(tmp_path, saved, texts, capsys):
    """The tokenizer is the base model's, and the adapter's change of the router shows."""
    base = AutoModelForCausalLM.from_pretrained(saved)
    model = get_peft_model(base, LoraConfig(target_parameters=["mlp.gate.weight"], r=4, lora_alpha=64))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    words = ["--texts", *texts[0], "--field", "body", "--json", "-"]
    counts = {}
    for name in (saved, str(tmp_path / "adapter")):
        assert cli.main(["inspect", name, *words]) == 0
        counts[name] = json.loads(capsys.readouterr().out)["layers"][0]["counts"]["overall"]
    live = inspect_model(model, make_tokenizer(), domains_of(texts))
    assert counts[str(tmp_path / "adapter")] == live.layers[0].counts.sum(0).tolist() != counts[saved]


def test_one_domain_has_no_specialisation(tmp_path, saved, texts, capsys):
    assert cli.main(["inspect", saved, "--texts", texts[0][1], "--json", "-", "--html", str(tmp_path / "a.html")]) == 0
    captured = capsys.readouterr()
    written = json.loads(captured.out)
    assert set(written["summary"]) == {"overall"} and written["specialists"] == {}
    assert written["layers"][0]["specialisation"] is None
    assert "Specialisation" not in (tmp_path / "a.html").read_text() and "domain uses" not in captured.err


def test_page_escapes_what_it_is_given(texts):
    domains = [Domain("<b>&", d.files, d.fields) if d.name == "low" else d for d in domains_of(texts)]
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains, seq_len=SEQ_LEN)
    found.model["name"] = "</title><script>"
    page = html_report(found)
    assert "<b>&" not in page and "</title><script>" not in page and "&lt;b&gt;&amp;" in page


def test_colours_and_ticks():
    assert [colour_step(value) for value in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 64.0)] == [-8, -8, -8, -4, 0, 4, 8, 8]
    assert nice_ticks(0.93) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(7.0) == [0.0, 2.0, 4.0, 6.0, 8.0] and nice_ticks(0.0) == [0.0, 1.0]
    for highest in (1e-6, 0.013, 3.0, 4.7, 120.0):
        ticks = nice_ticks(highest)
        assert ticks[-1] >= highest > ticks[-2] and 2 <= len(ticks) <= 6


def test_help_needs_neither_torch_nor_transformers():
    path = importlib.util.find_spec("hf_phibalance.cli").origin
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cli', {path!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.make_parser().parse_args(['inspect', 'm', '--texts', 'a=b'])\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)\n"
        "module.main(['inspect', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--ignore_phi_balance" in done.stdout


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="the real data is not here")
def test_real_text(tmp_path, capsys):
    """A tiny model with random weights still tells GSM8K from Python sources: their tokens differ."""
    from hf_phibalance.models import train_tokenizer

    with (DATA / "gsm8k" / "test.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(40)]
    source = Path(json.__file__).parent
    tokenizer = train_tokenizer([row["question"] for row in rows] + [(source / "decoder.py").read_text()], 400)
    tiny_model("mixtral", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"math={DATA}/gsm8k/test.jsonl", f"prose={DATA}/wikitext2/valid.txt", f"code={source}"]
    words = ["--field", "math=question", "math=answer", "--max_tokens", "3000", "--seq_len", "64", "--json", "-"]
    assert cli.main(["inspect", str(tmp_path / "model"), "--texts", *texts, *words]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [read["tokens"] for read in written["domains"].values()] == [3000] * 3
    for layer in written["layers"]:
        assert sum(layer["counts"]["overall"]) == 3 * 3000 * 2
        assert layer["figures"]["code"]["design_effect"] > 1.5  # real text is not independent tokens
        assert not layer["specialisation"]["noise"]
        assert 0.002 < layer["specialisation"]["mutual_information"] < layer["specialisation"]["plug_in"] < 1.0
    assert all(1 <= len(entries) <= 5 for entries in written["specialists"].values())
