"""Which tokens pay: padding never; and what `balance_loss` says that the others have paid."""

import pytest
import torch
from charging import COEF
from references import forward, price_loss
from steps import CHECKPOINTING, added_gradient, assert_gradient, build, loss_gradient, micro_batches, step_gradient
from tiny import set_prices

import hf_phibalance as phb


pytestmark = pytest.mark.slow


RATE = 0.3


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_padding_neither_pays_nor_counts(token_mask):
    """With `"labels"` neither do the first tokens of each row, which have none."""
    model, plain, prices = build("mixtral"), build("mixtral"), {}
    batches = micro_batches(model)
    for batch in batches:
        batch["labels"][:, :2] = -100
    config = {"coef": COEF, "token_mask": token_mask}
    added = added_gradient(model, config, batches, lambda patched: prices.update(set_prices(patched).prices()))
    column = {"attention": "attention_mask", "labels": "labels"}[token_mask]
    assert_gradient(added, loss_gradient(plain, batches, [(COEF, price_loss(prices))], token_mask=column))
    with torch.no_grad():
        routed = [forward(plain, batch, column)[1] for batch in batches]
    balancer = phb.get_balancer(model)
    for name, load in balancer.loads().items():
        assert load.tolist() == sum(micro_batch[name].counts for micro_batch in routed).tolist()
    counted = [next(iter(micro_batch.values())).mask for micro_batch in routed]
    assert balancer.metrics()["tokens"] == sum(int(mask.sum()) for mask in counted)
    assert sum(int((~mask).sum()) for mask in counted) > 0


def paid(routed, means, price_from, track):
    """
    COEF times the sum over layers of ⟨q, p⟩, averaged over the tokens of a step. q is the centred log of the relative load
    (arXiv 2605.15403, Algorithm 1), after the statistic of this micro-batch, or of all so far, is mixed into the mean.
    """
    total = tokens = 0.0
    for j, micro_batch in enumerate(routed):
        for name, router in micro_batch.items():
            seen = [earlier[name] for earlier in routed[: j + 1]] if price_from == "global" else [router]
            if track == "probs":
                sums = sum(r.probs[r.mask.flatten()].double().sum(0) for r in seen)
            else:
                sums = sum(r.counts for r in seen)
            mean = (1 - RATE) * means[name].double() + RATE * sums / sums.sum()
            price = (len(mean) * mean).log()
            total += int(router.mask.sum()) * float((price - price.mean()) @ router.mean_probs())
        tokens += int(router.mask.sum())
    return COEF * total / tokens


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("track", ["probs", "load"])
@pytest.mark.parametrize("price_from", ["current", "global"])
def test_balance_loss_of_prices_of_the_step_under_way(price_from, track, checkpointing):
    """Two steps, of which each has its own value; nothing learns in between."""
    model, plain = build("mixtral", checkpointing), build("mixtral")
    phb.patch(model, {"coef": COEF, "price_from": price_from, "track": track, "ema_rate": RATE})
    balancer = set_prices(model)
    for step in range(2):
        means, batches = balancer.means(track), micro_batches(model, seed=10 * step)
        with torch.no_grad():
            routed = [forward(plain, batch)[1] for batch in batches]
        expected = paid(routed, means, price_from, track)
        other = paid(routed, means, "global" if price_from == "current" else "current", track)
        step_gradient(model, batches)
        assert balancer.metrics()["balance_loss"] == pytest.approx(expected, rel=1e-4)
        assert abs(expected - other) > 1e-2 * abs(expected)
