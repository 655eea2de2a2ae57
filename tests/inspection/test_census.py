"""Counts of what routers choose against a naive loop, in every kind of family; and the model is left as it was."""

import math

import pytest
import torch
from made_texts import SEQ_LEN, cut, domains_of, make_tokenizer
from tiny import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_phibalance as phb
from hf_phibalance.inspection import inspect_model
from hf_phibalance.inspection.census import RouterCensus
from hf_phibalance.inspection.texts import leading_tokens


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


def test_max_tokens_is_exact(texts):
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN, max_tokens=50)
    assert [read["tokens"] for read in found.domains.values()] == [50, 50]
    documents = texts[1]["high"]
    counts, _ = naive(tiny_model("mixtral"), softmax_choice, cut([documents[0][:50]], SEQ_LEN))
    assert [layer.counts[1].tolist() for layer in found.layers] == list(counts.values())


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
    assert found.model["selection_bias"] == "phi_balance.state"
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
