"""Runs of the comparison: their figures, what two of them have in common, and the key by which one is found again."""

import json
import math

import numpy as np
import pytest
import torch
from comparison import small_run

import hf_phibalance as phb


def test_churn_is_what_the_duals_move(house, corpus):
    """Without a bias nothing moves; with one, the figure of the run is that of a replay with copied choices."""
    train = house["loop"].train
    still = train(small_run(house, method={"method": "phi", "coef": 0.1}), corpus)
    assert still["metrics"]["churn"] == 0
    biased = {"method": "phi", "coef": 0.0, "bias_coef": 0.05}
    run = small_run(house, method=biased)
    moved = train(run, corpus)
    assert moved["metrics"]["churn"] > 0

    model = house["models"].build_model("mixtral", corpus.vocab_size, 0, **run.model_fields)
    phb.patch(model, phb.PhiBalanceConfig(**biased))
    balancer = phb.get_balancer(model)
    probe = torch.cat([corpus.validation[domain][:8] for domain in corpus.validation])

    def sets(biases):
        """The top-k of the biased probabilities, from the router's logits and these biases, token by token."""
        seen, present = {}, balancer.biases()
        balancer.set_biases(biases)
        hooks = [
            site.modules[0].register_forward_hook(
                lambda m, a, out, name=site.name: seen.update({name: out[0].softmax(-1)})
            )
            for site in balancer.sites
        ]
        model.eval()
        with torch.no_grad():
            model(input_ids=probe)
        model.train()
        for hook in hooks:
            hook.remove()
        balancer.set_biases(present)
        return [set(row) for name, p in seen.items() for row in (p + biases[name]).topk(2).indices.tolist()]

    optimizer = torch.optim.AdamW(house["loop"].parameter_groups(model, 0.1), lr=run.learning_rate, betas=(0.9, 0.95))
    shares = []
    for step, ids in enumerate(house["streams"].batches(corpus, "mixed", 8, 6, 0)):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * house["loop"].lr_factor(step, 8)
        biases = balancer.biases()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 6:  # the last quarter
            before, after = sets(biases), sets(balancer.biases())
            shares.append(sum(len(b - a) for b, a in zip(before, after)) / (2 * len(before)))
    assert moved["metrics"]["churn"] == pytest.approx(np.mean(shares))


def test_figures_of_a_run(house, corpus):
    """Two layers of the loop's own bookkeeping, done again from outside: batch MaxVio and the loss by domain."""
    record = house["loop"].train(small_run(house, stream="shift", steps=24), corpus)
    figures = record["metrics"]
    assert json.loads(json.dumps(record)) == record
    assert figures["loss"] == pytest.approx(np.mean([figures[f"loss_{d}"] for d in corpus.validation]))
    shares = np.array(record["experts"])
    assert shares.shape == (2, 3, 8) and np.allclose(shares.sum(-1), 1, atol=1e-4)
    assert figures["max_vio_global"] == pytest.approx((shares.mean(1).max(-1) * 8 - 1).mean(), abs=1e-3)
    assert 0 <= figures["recovery_steps"] <= 12 and figures["step_ms"] > 0
    again = house["loop"].train(small_run(house, stream="shift", steps=24), corpus)
    timing = {"step_ms", "run_seconds", "cpu_seconds"}
    assert {n: v for n, v in again["metrics"].items() if n not in timing} == pytest.approx(
        {n: v for n, v in figures.items() if n not in timing}
    )


@pytest.mark.parametrize("model", ["mixtral", "deepseek_v3"])
def test_an_interrupted_run_goes_on_bit_identically(house, corpus, tmp_path, model):
    own = {} if model == "mixtral" else {"model_fields": {}}
    run = small_run(house, model=model, method={"coef": 0.1, "bias_coef": 0.05}, steps=16, **own)
    whole = house["loop"].train(run, corpus)
    unfinished = house["unfinished"].Unfinished(tmp_path / "run.pt", every=0)
    steps = []

    def interrupt(step):
        steps.append(step)
        if step in (5, 14):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            house["loop"].train(run, corpus, interrupt, unfinished)
    again = house["loop"].train(run, corpus, interrupt, unfinished)
    assert steps == list(range(1, 17))
    for record in (whole, again):
        for name in ("step_ms", "run_seconds", "cpu_seconds"):
            del record["metrics"][name]
    assert again == whole
    unfinished.remove()
    assert not list(tmp_path.iterdir())
    assert house["unfinished"].Unfinished(tmp_path / "run.pt").take_up({}) == {}


def test_same_start_for_all_methods(house, corpus):
    first = [
        house["loop"].train(small_run(house, method=method, steps=1), corpus)["curve"]["loss"][0]
        for method in ({"method": "none"}, {"method": "switch"}, {"coef": 0.0, "bias_coef": 0.01})
    ]
    other = house["loop"].train(small_run(house, seed=1, steps=1), corpus)["curve"]["loss"][0]
    assert first[0] == first[1] == first[2] != other


def test_switch_and_global_batch_differ_only_between_micro_batches(house, corpus):
    def losses(method, micro_batches):
        run = small_run(house, method={"method": method, "coef": 1.0}, micro_batches=micro_batches, steps=12)
        return house["loop"].train(run, corpus)["curve"]["loss"]

    assert losses("switch", 1) == losses("global_batch", 1)
    assert losses("switch", 3) != losses("global_batch", 3)


def test_micro_batches_are_one_step(house, corpus):
    whole, parts = (house["loop"].train(small_run(house, micro_batches=n), corpus) for n in (1, 3))
    assert parts["curve"]["loss"] == pytest.approx(whole["curve"]["loss"], abs=2e-4)


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_the_other_models_train(house, corpus, model):
    record = house["loop"].train(small_run(house, model=model, model_fields={}, steps=4), corpus)
    assert record["metrics"]["loss"] < 2 * math.log(corpus.vocab_size)


def test_divergence_is_recorded(house, corpus):
    record = house["loop"].train(small_run(house, learning_rate=float("1e20"), steps=8), corpus)
    assert 1 <= record["metrics"]["diverged_at"] <= 8
    assert set(record["metrics"]) == {"diverged_at"}


def test_keys(house):
    """A result is found by everything that was read, and by nothing else."""
    key = lambda **fields: small_run(house, **fields).key  # noqa: E731
    base = key(method={"coef": 0.02})
    assert base == key(method={"coef": 0.02, "ema_rate": phb.PhiBalanceConfig().ema_rate})
    assert base == key(method={"coef": 0.02, "method": "phi", "bias_coef": 0.0})
    different = [
        key(method={"coef": 0.03}),
        key(method={"coef": 0.02, "ema_rate": 0.11}),
        key(method={"coef": 0.02, "z_loss_coef": 0.1}),
        key(method={"method": "switch", "coef": 0.02}),
        key(method={"coef": 0.02}, seed=1),
        key(method={"coef": 0.02}, steps=9),
        key(method={"coef": 0.02}, micro_batches=2),
        key(method={"coef": 0.02}, stream="shift"),
        key(method={"coef": 0.02}, model="qwen3_moe"),
    ]
    assert len({base, *different}) == len(different) + 1
    run = small_run(house, method={"coef": 0.02})
    assert house["run"].key_of(run.settings | {"corpus": "another"}) == run.key
