"""Completions: where they end, and that they are those of lm-evaluation-harness."""

import pytest
from evaluated import Scripted, biased_mixtral

from hf_phibalance.evaluation import Decoding, load_problems, make_prompts, reset_generation_config
from hf_phibalance.evaluation.generation import generate


@pytest.fixture(scope="module")
def biased():
    model, tokenizer = biased_mixtral()
    reset_generation_config(model, tokenizer)
    return model.eval(), tokenizer


def test_generation_stops_at_text_of_the_completion_only(biased):
    _, tokenizer = biased
    prompts = ["x = 1\n", "a much longer prompt than the other one\n"]
    texts = ["if x:\n    y = 2\nif y:\n    and more of it", "print(1)"]  # "\nif" across the border is no stop
    model = Scripted(tokenizer, dict(zip(prompts, texts)))
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    outcomes = list(generate(model, tokenizer, ids, Decoding(100, ("\nif", "\nprint")), seed=0))
    assert [(text, ended) for text, _, ended in outcomes] == [("if x:\n    y = 2", "stop"), ("print(1)", "eos")]
    spent = len(tokenizer("if x:\n    y = 2\nif")["input_ids"]) + len(tokenizer("print(1)")["input_ids"]) + 1
    assert model.steps <= spent + 1  # nothing is generated behind a stop
    short = Decoding(3, ("\nif",))
    assert [ended for _, _, ended in generate(model, tokenizer, ids, short, seed=0)] == ["length"] * 2


def test_completions_are_those_of_the_harness(biased):
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = biased
    texts = make_prompts("gsm8k", *load_problems("gsm8k", "toy", limit=10))
    stops = ["th", "o", "\n"]
    wanted = {"until": stops, "max_gen_toks": 20, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, dict(wanted)), 0) for text in texts]
    theirs = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(requests, True)
    ours = []
    for text in texts:
        ours += generate(model, tokenizer, [tokenizer(text)["input_ids"]], Decoding(20, stops), seed=0)
    assert [text for text, _, _ in ours] == theirs
    assert "stop" in {ended for _, _, ended in ours} and len(set(theirs)) > 1
