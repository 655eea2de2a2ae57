"""Counts of what routers choose against a naive loop, in every kind of family. The model is left as it was."""

import math

import pytest
import torch
from made_texts import SEQ_LEN, cut, domains_of, make_tokenizer
from naive_choices import NAIVE, naive_choices
from tiny import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_phibalance as phb
from hf_phibalance.inspection import inspect_model
from hf_phibalance.inspection.counting import RouterCounter
from hf_phibalance.routers import reading


def inspected(model, texts, tokenizer=None, **options):
    return inspect_model(model, tokenizer or make_tokenizer(), domains_of(texts), **({"seq_len": SEQ_LEN} | options))


def naive(model, sequences, prefix=()):
    """Counts and confidence by layer, from one unpadded forward per sequence and the logits that transformers records."""
    counts, confidence = {}, {}
    for ids in sequences:
        for layer, (probs, chosen) in enumerate(naive_choices(model, [*prefix, *ids])):
            for row, own in list(zip(chosen.tolist(), probs))[len(prefix) :]:
                for expert in row:
                    counts.setdefault(layer, [0] * 8)[expert] += 1
                figures = [own.max(), own[row].sum(), -(own * own.log2()).sum()]
                total = confidence.setdefault(layer, [0.0, 0.0, 0.0])
                confidence[layer] = [a + float(b) for a, b in zip(total, figures)]
    return counts, confidence


@pytest.mark.slow
@pytest.mark.parametrize("model_type", NAIVE)
def test_counts_are_those_of_a_naive_loop(model_type, texts):
    """Padded batches of several sequences against one unpadded sequence at a time; a family's own bias is in the choice."""
    model, generator = tiny_model(model_type), torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    found = inspected(model, texts, batch_size=3)
    assert found.model["selection_bias"] == ("the family's own" if model_type == "deepseek_v3" else "none")
    for index, documents in enumerate(texts[1].values()):
        counts, confidence = naive(model, cut(documents, SEQ_LEN))
        assert len(found.layers) == len(counts) >= 2
        for layer, expected, sums in zip(found.layers, counts.values(), confidence.values()):
            assert layer.counts[index].tolist() == expected, layer.name
            assert layer.halves[:, index].sum(-1).min() > 0
            torch.testing.assert_close(layer.confidence[index].tolist(), sums, rtol=1e-5, atol=0)
    tokens = {name: sum(map(len, documents)) for name, documents in texts[1].items()}
    assert {name: read["tokens"] for name, read in found.domains.items()} == tokens
    assert found.layers[0].tokens().tolist() == list(tokens.values())


def test_special_tokens_are_fed_but_not_counted(texts):
    model = tiny_model("mixtral")
    found = inspected(model, texts, make_tokenizer(bos=True), seq_len=SEQ_LEN + 1, batch_size=4)
    for index, documents in enumerate(texts[1].values()):
        counts, _ = naive(model, cut(documents, SEQ_LEN), prefix=[1])
        assert [layer.counts[index].tolist() for layer in found.layers] == list(counts.values())
    assert any("special tokens" in note for note in found.notes)


def test_a_cut_text_counts_only_what_was_read(texts):
    found = inspected(tiny_model("mixtral"), texts, max_tokens=50)
    assert [read["tokens"] for read in found.domains.values()] == [50, 50]
    counts, _ = naive(tiny_model("mixtral"), cut([texts[1]["high"][0][:50]], SEQ_LEN))
    assert [layer.counts[1].tolist() for layer in found.layers] == list(counts.values())


def test_batches_and_repetition_do_not_change_the_counts(texts):
    runs = [inspected(tiny_model("mixtral"), texts, batch_size=size) for size in (1, 5, 5)]
    for layer, other in zip(runs[0].layers, runs[1].layers):
        assert torch.equal(layer.halves, other.halves)
    assert runs[1].to_dict() == runs[2].to_dict()


@pytest.mark.slow
def test_selection_bias_of_a_balanced_checkpoint_counts(tmp_path, texts):
    model = phb.patch(tiny_model("mixtral"), {"coef": 0.0, "bias_coef": 0.1})
    state = phb.get_balancer(model).state_dict()
    for name in [name for name in state if name.endswith(".bias")]:
        state[name] = torch.linspace(-1, 1, 8)
    phb.get_balancer(model).load_state_dict(state)
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    hooks = hooks_of(loaded)
    found = inspected(loaded, texts)
    assert hooks_of(loaded) == hooks  # still patched
    assert found.model["selection_bias"] == "phi_balance.state"
    with phb.get_balancer(loaded).evaluation(), torch.no_grad():
        for ids in [ids for documents in texts[1].values() for ids in cut(documents, SEQ_LEN)]:
            loaded(torch.tensor([ids]), use_cache=False)
        expected = phb.get_balancer(loaded).eval_metrics(per_layer=99)
    for layer in found.layers:
        figures = found.layer_figures(layer)["overall"]
        assert figures["max_vio"] == pytest.approx(expected[f"max_vio/{layer.name}"], rel=1e-5)
    plain = inspected(AutoModelForCausalLM.from_pretrained(tmp_path), texts)
    assert plain.model["selection_bias"] == "none"
    assert not torch.equal(plain.layers[0].counts, found.layers[0].counts)


def hooks_of(model):
    modules = model.named_modules()
    return [(name, list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in modules]


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(texts, fails):
    model = tiny_model("deepseek_v3").train()
    model.model.layers[1].eval()
    hooks = hooks_of(model)

    def all_of(model):
        parameters = [(p.requires_grad, p.grad) for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        return hooks_of(model), model.config.to_dict(), set(vars(model)), modes, parameters

    before, state = all_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_batch(stream):
        assert hooks_of(model) != hooks
        if fails:
            raise KeyboardInterrupt

    try:
        inspected(model, texts, on_batch=on_batch)
        assert not fails
    except KeyboardInterrupt:
        assert fails
    assert all_of(model) == before
    assert all(torch.equal(tensor, state.pop(name)) for name, tensor in model.state_dict().items()) and not state


@pytest.mark.slow
def test_counts_do_not_grow_with_the_text():
    model = tiny_model("mixtral")

    def kept(repeats):
        counter, ids = RouterCounter(model, domains=2), torch.randint(3, 128, (4, 8))
        with reading(counter), torch.no_grad():
            for _ in range(repeats):
                with counter.counting(0, torch.ones(4, 8, dtype=torch.bool), torch.tensor([0, 1, 0, 1])):
                    counter.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert counter.layers[0].counts.sum() == repeats * 4 * 8 * 2
        held = [value for owner in (counter, *counter.layers) for value in vars(owner).values()]
        return [value.shape for value in held if isinstance(value, torch.Tensor)]

    once = kept(1)
    assert kept(64) == once and (2, 2, 8) in once


def test_models_that_cannot_be_inspected(texts):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    dense = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes))
    broken = tiny_model("mixtral")
    broken.model.layers[0].mlp.gate.weight.data.fill_(math.nan)
    for model, message in (
        (dense, "nothing to inspect: LlamaForCausalLM has no router"),
        (tiny_model("doge"), "product keys"),
        (tiny_model("mixtral", vocab_size=100), r"token 1\d\d, but the model has a vocabulary of 100"),
        (broken, r"layers.0.mlp.gate' are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            inspected(model, texts)
