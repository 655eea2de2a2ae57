"""What differs between two models on the same texts, token by token, against naive forwards and planted changes."""

import gc
import json
import weakref

import pytest
import torch
from made_texts import SEQ_LEN, cut, domains_of, make_tokenizer, words
from naive_choices import NAIVE, naive_choices
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_phibalance as phb
from hf_phibalance import cli
from hf_phibalance.cli import commands
from hf_phibalance.inspection import Comparison, Inspection, inspect_model
from hf_phibalance.inspection.counting import EXAMPLE_TOKENS
from hf_phibalance.inspection.results import Layer
from hf_phibalance.inspection.texts import token_texts


FAMILIES = [pytest.param(name, marks=() if name == "mixtral" else pytest.mark.slow) for name in NAIVE]


def inspected(model, texts, **options):
    settings = {"seq_len": SEQ_LEN, "batch_size": 3, "keep_choices": True} | options
    return inspect_model(model, make_tokenizer(), domains_of(texts), **settings)


def tuned(model_type):
    """The tiny model with its routers, and their own biases if there are any, moved."""
    model, generator = tiny_model(model_type), torch.Generator().manual_seed(7)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in (".gate.", ".router.", "e_score_correction_bias")):
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


# ---------------------------------------------------------------------- against naive forwards


@pytest.mark.parametrize("model_type", FAMILIES)
def test_choices_that_differ_are_those_of_naive_forwards(model_type, texts):
    pair = tiny_model(model_type), tuned(model_type)
    found = Comparison(*(inspected(model, texts) for model in pair))
    totals = [0] * len(found.before.layers)
    for domain, documents in texts[1].items():
        differ = [0] * len(found.before.layers)
        for ids in cut(documents, SEQ_LEN):
            for index, ((_, was), (_, now)) in enumerate(zip(*(naive_choices(model, ids) for model in pair))):
                differ[index] += sum(len({*one} - {*other}) for one, other in zip(was.tolist(), now.tolist()))
        chosen = sum(map(len, documents)) * found.before.layers[0].top_k
        shares = [layer[domain]["differ"] for layer in found.layer_figures]
        assert shares == pytest.approx([count / chosen for count in differ], abs=1e-9) and min(differ) > 0
        totals = [total + count for total, count in zip(totals, differ)]
    chosen = int(found.before.layers[0].counts.sum())
    for layer, total in zip(found.layer_figures, totals):
        assert layer["overall"]["differ"] == pytest.approx(total / chosen)
        assert layer["overall"]["load_moved"] <= layer["overall"]["differ"] < layer["overall"]["differ_if_unrelated"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_examples_are_the_first_texts_token_by_token(model_type, texts):
    model = tiny_model(model_type)
    found = inspected(model, texts, seq_len=30, examples=2)
    rows, (long,) = texts[1]["low"][:2], texts[1]["high"]
    assert [example.domain for example in found.examples] == ["low", "low", "high"]
    for example, ids in zip(found.examples, [*rows, long[:30]]):
        assert "".join(example.tokens).split() == [f"w{i}" for i in ids] and len(example.tokens) == len(ids)
        for chosen, weights, (probs, expected) in zip(example.choices, example.weights, naive_choices(model, ids)):
            assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
            wanted = probs.gather(-1, chosen)
            torch.testing.assert_close(weights, (wanted / wanted.sum(-1, keepdim=True)).float())
            assert (weights.diff(dim=-1) <= 0).all()
    assert not inspected(model, texts, examples=0).examples


def test_examples_are_short_and_without_special_tokens(tmp_path):
    (tmp_path / "a.txt").write_text(words(EXAMPLE_TOKENS + 50))
    model = tiny_model("mixtral", max_position_embeddings=512)
    (example,) = inspect_model(model, make_tokenizer(bos=True), domains_of([[f"low={tmp_path}/a.txt"]])).examples
    assert len(example.tokens) == EXAMPLE_TOKENS and "<s>" not in "".join(example.tokens)
    assert [len(chosen) for chosen in example.choices] == [EXAMPLE_TOKENS] * 3


def test_tokens_within_a_character_have_no_text_and_the_last_has_all():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert token_texts(tokenizer, tokenizer("a é\n😀")["input_ids"]) == ["a", " ", "", "é", "\n", "", "", "", "😀"]


# ---------------------------------------------------------------------- planted changes

TOKENS, LENGTH, EXPERTS = 4000, 10, 8


def made(choices, domains=("a", "b"), tokens=TOKENS, experts=EXPERTS):
    """An inspection of one layer, of the `choices (D N, k)` of N tokens per domain, in sequences of `LENGTH`."""
    half = torch.arange(tokens) // LENGTH % 2
    parts = choices.split(tokens)
    counts = [[torch.bincount(part[half == h].flatten(), minlength=experts) for part in parts] for h in range(2)]
    halves = torch.stack([torch.stack(of_half) for of_half in counts])
    layer = Layer("layers.0.gate", choices.shape[1], "softmax", halves, torch.zeros(len(parts), 3).double())
    layer.choices = choices.to(torch.uint8)
    read = {"tokens": tokens, "sequences": tokens // LENGTH, "documents": 1, "files": 1, "files_read": 1}
    return Inspection({"name": "made"}, {"seq_len": LENGTH}, dict.fromkeys(domains, read), [layer])


def drawn(logits_E, tokens, generator, length=1):
    """Two experts for each token, the same for `length` tokens in a row."""
    gumbel = -(-torch.rand(tokens // length, len(logits_E), generator=generator).log()).log()
    return (logits_E + gumbel).topk(2, -1).indices.repeat_interleave(length, 0)


def some(choices, others, share, generator, length=1):
    """`choices` with `share` of the tokens, `length` in a row, choosing as in `others`."""
    is_other = (torch.rand(len(choices) // length, generator=generator) < share).repeat_interleave(length)
    return torch.where(is_other.unsqueeze(-1), others, choices)


def test_loads_that_chance_moves_are_marked_also_where_tokens_resemble_each_other():
    generator, even, tilted = torch.Generator().manual_seed(0), torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    tilted[0] = 4.0
    marked = {even: 0, tilted: 0}
    for _ in range(50):
        was = drawn(even, TOKENS, generator, LENGTH)
        for goal in marked:
            now = some(was, drawn(goal, TOKENS, generator, LENGTH), 0.3, generator, LENGTH)
            figures = Comparison(made(was, ["a"]), made(now, ["a"])).layer_figures[0]["overall"]
            assert 0.1 < figures["differ"] < 0.35 and 0.7 < figures["differ_if_unrelated"] < 0.8
            marked[goal] += figures["noise"]["load_moved"]
    assert marked[even] >= 45 and marked[tilted] <= 5
    figures = Comparison(made(was, ["a"]), made(was, ["a"])).layer_figures[0]["overall"]
    assert figures["differ"] == figures["load_moved"] == 0


def test_what_became_of_a_domains_experts():
    """Domain a loses expert 0 and keeps expert 1, whose tokens change in both directions; expert 5 is new."""
    generator = torch.Generator().manual_seed(0)

    def logits(*experts):
        return torch.zeros(EXPERTS).index_fill(0, torch.tensor(experts), 2.0)

    was_a, b = drawn(logits(0, 1), TOKENS, generator), drawn(torch.zeros(EXPERTS), TOKENS, generator)
    now_a = some(was_a, drawn(logits(1, 5), TOKENS, generator), 0.9, generator)
    now_b = some(b, drawn(torch.zeros(EXPERTS), TOKENS, generator), 0.5, generator)
    found = Comparison(made(torch.cat([was_a, b])), made(torch.cat([now_a, now_b])))
    fates = found.specialists("a")
    assert (fates["before"], fates["new"]) == (2, 1)
    by_expert = {entry["expert"]: entry for entry in fates["experts"]}
    assert {expert: entry["is_new"] for expert, entry in by_expert.items()} == {0: False, 1: False, 5: True}
    for expert, entry in by_expert.items():
        share = [float((part == expert).any(-1).double().mean()) for part in (was_a, now_a, b, now_b)]
        assert entry["change"] == pytest.approx(share[1] - share[0] - share[3] + share[2])
        for when, inspection in (("before", found.before), ("after", found.after)):
            expected = inspection.preferences(inspection.layers[0], "a")["lift"][expert]
            assert entry[when]["lift"] == pytest.approx(float(expected))
    assert [by_expert[expert]["noise"] for expert in (0, 1, 5)] == [False, True, False]
    assert (
        not by_expert[0]["before"]["noise"] and by_expert[5]["before"]["noise"] and not by_expert[5]["after"]["noise"]
    )
    assert fates["still"] == 2 - by_expert[0]["after"]["noise"]
    assert [entry["expert"] for entry in found.specialists("a", top=1)["experts"]][-1] == 5
    json.dumps(found.specialists("b"), allow_nan=False)


# ---------------------------------------------------------------------- what is refused


def test_inspections_that_cannot_be_compared(texts):
    found, other_size = (inspected(tiny_model("mixtral", **size), texts) for size in ({}, {"num_local_experts": 4}))
    found.model["name"], other_size.model["name"] = "one", "another"
    for other, message in (
        (
            other_size,
            r"routers of 'one' and 'another' do not match, they have 3 routers of 8 experts, top-2 .* 4 experts",
        ),
        (inspected(tiny_model("mixtral"), texts, max_tokens=50), "did not read the same tokens"),
        (inspected(tiny_model("mixtral"), texts, seq_len=11), "did not read the same tokens"),
        (inspected(tiny_model("mixtral"), texts, keep_choices=False), "were not kept"),
    ):
        with pytest.raises(ValueError, match=message):
            Comparison(found, other)


def test_as_many_tokens_with_other_ids_are_refused(tmp_path):
    found = []
    for first in (3, 4):
        (tmp_path / "a.txt").write_text(words(30, first=first))
        found.append(inspected(tiny_model("mixtral"), [[f"low={tmp_path}/a.txt"]]))
    with pytest.raises(ValueError, match="did not read the same tokens"):
        Comparison(*found)


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a tiny model, with a fine-tuned router, its adapter, that merged, and with a selection bias."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("qwen3_moe").save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    base = phb.AutoModelForCausalLM.from_pretrained(folder / "base", phi_balance=False)
    model = get_peft_model(base, LoraConfig(target_parameters=["mlp.gate.weight"], r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    model = phb.patch(tiny_model("qwen3_moe"), {"coef": 0.0, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: torch.linspace(-0.1, 0.1, 8) for name in balancer.layer_names})
    model.save_pretrained(folder / "biased")
    for name in ("base", "merged", "biased"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


def command(capsys, *words):
    assert cli.main(["inspect", *map(str, words), "--field", "body", "--json", "-"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.mark.slow
def test_an_adapter_a_merged_model_and_a_selection_bias(saved, texts, capsys, tmp_path):
    html = ["--html", tmp_path / "a.html"]
    changed, shown = command(capsys, saved / "base", saved / "adapter", "--texts", *texts[0], *html)
    assert changed["summary"]["overall"]["differ"] > 0.01
    for text in ("adapter, compared to base", "differ", "layer 2 before", "low: ", "of them still"):
        assert text in shown
    page = (tmp_path / "a.html").read_text()
    differ = f"{100 * changed['summary']['overall']['differ']:.1f} %"
    assert "adapter, compared to base" in page and differ in page and "Which expert does each token use?" in page

    merged, _ = command(capsys, saved / "adapter", saved / "merged", "--texts", *texts[0])
    assert [layer["figures"]["overall"]["differ"] for layer in merged["layers"]] == [0, 0]
    assert merged["before"]["layers"] == merged["after"]["layers"]
    assert merged["before"]["summary"] == changed["after"]["summary"]

    biased, _ = command(capsys, saved / "base", saved / "biased", "--texts", *texts[0])
    assert biased["summary"]["overall"]["differ"] > 0.01
    assert [biased[when]["model"]["selection_bias"] for when in ("before", "after")] == ["none", "phi_balance.state"]
    plain, _ = command(capsys, saved / "base", saved / "biased", "--texts", *texts[0], "--ignore_phi_balance")
    assert plain["summary"]["overall"]["differ"] == 0


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time_and_both_read_the_same_sequences(
    saved, texts, capsys, monkeypatch, tmp_path
):
    """Also if the second model takes longer sequences."""
    tiny_model("qwen3_moe", max_position_embeddings=4096).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    load, loaded = commands._load_model, []

    def watched(*args, **options):
        assert all(model() is None for model in loaded)
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(commands, "_load_model", watched)
    gc.disable()  # so that a cycle of references would keep the model
    try:
        found, _ = command(capsys, saved / "biased", tmp_path, "--texts", *texts[0])
    finally:
        gc.enable()
        gc.collect()
    assert [model() for model in loaded] == [None, None]
    assert found["before"]["settings"] == found["after"]["settings"] and found["after"]["settings"]["seq_len"] == 64


@pytest.mark.slow
def test_other_tokenizers_are_refused_before_a_model_is_loaded(saved, texts, capsys, monkeypatch, tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    other = make_tokenizer()
    vocab = {name: (i + 5 if i > 2 else i) % 128 for name, i in other.get_vocab().items()}
    other._tokenizer.model = models.WordLevel(vocab, unk_token="<pad>")
    other.save_pretrained(tmp_path)
    words = ["inspect", str(saved / "base"), str(tmp_path), "--texts", *texts[0], "--field", "body"]
    with monkeypatch.context() as context:
        context.setattr(commands, "_load_model", lambda *_: pytest.fail("a model is loaded"))
        assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert f"the tokenizers of '{saved / 'base'}' and '{tmp_path}' make different tokens of low" in error
    assert cli.main([*words, "--tokenizer", str(saved / "base")]) == 0
