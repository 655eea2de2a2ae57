"""Metrics load by path, imports stay light, and a patched model works in lm-evaluation-harness as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluated import ADD_ONE
from tiny import tiny_model

import hf_phibalance as phb
from hf_phibalance import evaluation
from hf_phibalance.evaluation import GSM8K_STOPS, truncate


FOLDER = Path(evaluation.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{0}", "{0}/{0}.py"])
def test_both_metrics_load_by_path(form, tmp_path, monkeypatch):
    import evaluate
    import evaluate.loading

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(evaluate.loading, "init_dynamic_modules", lambda: str(tmp_path / "loaded_modules"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loaded_modules").mkdir()
    (tmp_path / "loaded_modules" / "__init__.py").touch()
    try:
        gsm8k = evaluate.load(str(FOLDER / form.format("gsm8k_accuracy")))
        humaneval = evaluate.load(str(FOLDER / form.format("humaneval_pass_at_k")))
    finally:
        for name in [name for name in sys.modules if name.startswith("loaded_modules")]:
            del sys.modules[name]
    assert isinstance(gsm8k, evaluate.Metric) and isinstance(humaneval, evaluate.Metric)
    assert gsm8k.compute(predictions=["#### 18."], references=["18"]) == {"strict_match": 1.0, "flexible_extract": 1.0}
    result = humaneval.compute(predictions=[["    return x + 1"]], references=[ADD_ONE], allow_code_execution=True)
    assert result["pass@1"] == 1.0 and result["results"][0][0]["passed"]


def test_the_package_does_not_import_evaluate():
    code = (
        "import sys, hf_phibalance\n"
        "assert 'hf_phibalance.evaluation' not in sys.modules\n"
        "import hf_phibalance.evaluation as evaluation\n"
        "assert evaluation.truncate('a</s>b', evaluation.GSM8K_STOPS) == 'a'\n"
        "assert not {'evaluate', 'torch', 'transformers'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_without_evaluate_the_error_names_the_extra(monkeypatch):
    for name in ("GSM8KAccuracy", "HumanEvalPassAtK"):
        monkeypatch.delitem(evaluation.__dict__, name, raising=False)
        monkeypatch.setitem(sys.modules, "evaluate", None)
        with pytest.raises(ImportError, match=r'pip install "hf_phibalance\[recipes\]"'):
            getattr(evaluation, name)
        assert name in dir(evaluation)
    with pytest.raises(AttributeError, match="no attribute 'Bleu'"):
        evaluation.Bleu  # noqa: B018


def test_a_patched_model_goes_to_lm_evaluation_harness_as_it_is(tmp_path):
    """Its log-likelihoods are the model's own, it generates, and evaluation leaves the duals alone."""
    pytest.importorskip("lm_eval")
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from hf_phibalance.models import train_tokenizer

    texts = [f"Question: {i} and {j}?\nAnswer: {i + j}" for i in range(9) for j in range(9)]
    tokenizer = train_tokenizer(texts, max_length=64)
    model = phb.patch(tiny_model("mixtral", vocab_size=len(tokenizer)), phb.PhiBalanceConfig(coef=0.01))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    before = {name: value.clone() for name, value in phb.get_balancer(model).state_dict().items()}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    assert harness.model is model

    pairs = [("Question: 1 and 2?\nAnswer:", " 3"), ("Question: 4 and 4?\nAnswer:", " 8"), ("Question: 1", " and 1?")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, scores):
        start = tokenizer(context, add_special_tokens=False)["input_ids"]
        both = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([both])).logits.log_softmax(-1)[0]
        expected = sum(float(logits[at - 1, both[at]]) for at in range(len(start), len(both)))
        assert score == pytest.approx(expected, abs=1e-4)

    arguments = ("Question: 1 and 2?\nAnswer:", {"until": list(GSM8K_STOPS), "max_gen_toks": 8, "do_sample": False})
    (answer,) = harness.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    inputs = tokenizer(arguments[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == truncate(tokenizer.decode(tokens, skip_special_tokens=True), GSM8K_STOPS)
    after = phb.get_balancer(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
