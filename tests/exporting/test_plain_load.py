"""What a plain load would lose: counted by evaluations, and said when the model is saved."""

import pytest
import torch
from references import forward, routers
from steered import with_bias
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


def evaluate(model, batches):
    with phb.get_balancer(model).evaluation(), torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
        return phb.get_balancer(model).eval_metrics()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_evaluation_counts_what_a_plain_load_would_choose(model_type):
    """One layer, so that nothing before it chooses otherwise; padding does not count."""
    model, plain = with_bias(model_type, num_hidden_layers=1), tiny_model(model_type, num_hidden_layers=1)
    batches = [tiny_batch(model, 6, 12, seed=seed) for seed in range(3)]
    metrics = evaluate(model, batches)
    (name,) = routers(plain)
    with torch.no_grad():
        counts = sum(forward(plain, batch)[1][name].counts for batch in batches)
    assert metrics["plain_max_vio"] == pytest.approx(float(counts.max() / counts.mean()) - 1)
    assert metrics["plain_max_vio"] != pytest.approx(metrics["max_vio"])


@pytest.mark.parametrize("model_type, config", [("deepseek_v3", {"bias_coef": 0.1}), ("mixtral", {"coef": 0.01})])
def test_where_nothing_can_be_lost_nothing_is_said(model_type, config, tmp_path, warned):
    model = phb.patch(tiny_model(model_type), config)
    assert "plain_max_vio" not in evaluate(model, [tiny_batch(model)])
    model.save_pretrained(tmp_path)
    assert not warned.about("plain") and not warned.about("phi_balance.state")


def test_saving_gives_the_figures_and_the_remedy(tmp_path, warned):
    model = with_bias("mixtral")
    model.save_pretrained(tmp_path)
    (line,) = warned.about("loses it and routes some tokens to other experts.")
    assert "phb.fold(model, batches)" in line and "phibalance export" in line
    metrics = evaluate(model, [tiny_batch(model, 6, 12)])
    model.save_pretrained(tmp_path)
    said = f"MaxVio {metrics['plain_max_vio']:.3f} instead of {metrics['max_vio']:.3f} in the last evaluation"
    assert warned.about(said)
    phb.fold(model, [tiny_batch(model, 6, 12)])
    warned.lines.clear()
    model.save_pretrained(tmp_path)
    assert not warned.lines
