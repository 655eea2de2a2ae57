"""Evaluations, by one process and by several, and ranks that train in groups of their own."""

import pytest
import torch
import torch.distributed as dist
from invariance import in_ranks
from references import forward, naive_figures, naive_training
from tiny import tiny_batch, tiny_model
from training import make_trainer, pad, patched, rows

import hf_phibalance as phb


pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------- one process


def tokens_of(*batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def biased():
    """A patched Mixtral in eval mode whose selection bias sends many tokens to other experts."""
    model = phb.patch(tiny_model("mixtral"), {"bias_coef": 0.01})
    generator = torch.Generator().manual_seed(1)
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: 0.2 * torch.randn(8, generator=generator) for name in balancer.layer_names})
    return model, balancer


@torch.no_grad()
def test_an_evaluation_inside_another_leaves_it_open():
    model, balancer = biased()
    first, inner, last = (tiny_batch(model, size, 8, seed=size) for size in (2, 3, 5))
    with balancer.evaluation():
        model(**first, use_cache=False)
        outer = balancer.eval_metrics()
        with balancer.evaluation():
            assert balancer.eval_metrics() == {}
            model(**inner, use_cache=False)
            assert balancer.eval_metrics()["tokens"] == tokens_of(inner)
        assert balancer.eval_metrics() == outer and outer["tokens"] == tokens_of(first)
        model(**last, use_cache=False)
        assert balancer.eval_metrics()["tokens"] == tokens_of(first, last)
    with pytest.raises(RuntimeError, match="eval_metrics"):
        balancer.eval_metrics()


@torch.no_grad()
def test_plain_max_vio_is_that_of_the_top_k_without_the_bias():
    """MaxVio is (most assignments of an expert - mean) / mean, averaged over the layers; padding does not count."""
    model, balancer = biased()
    batches = [tiny_batch(model, 6, 12, seed=seed) for seed in range(3)]
    counts = {name: torch.zeros(8) for name in balancer.layer_names}
    with balancer.evaluation():
        for batch in batches:
            _, routed = forward(model, batch)
            for name, router in routed.items():
                chosen = router.logits.softmax(-1).topk(2).indices[router.mask.flatten()]
                counts[name] += torch.bincount(chosen.flatten(), minlength=8)
        metrics = balancer.eval_metrics()
    expected = sum(float(count.max() / count.mean()) - 1 for count in counts.values()) / len(counts)
    assert metrics["plain_max_vio"] == pytest.approx(expected, rel=1e-5)
    assert metrics["plain_max_vio"] != pytest.approx(metrics["max_vio"], rel=0.05)
    assert metrics["tokens"] == tokens_of(*batches)


# ---------------------------------------------------------------------- two ranks


def evaluation_set():
    return rows(8, seed=1)


def batch_of_rank(model, rank):
    return tiny_batch(model, 2 + rank, 8, seed=rank)


def evaluate_on_ranks(folder):
    model = patched()
    trainer = make_trainer(model, folder, eval_dataset=evaluation_set())
    phb.attach(trainer, per_layer=16)
    by_trainer = trainer.evaluate()
    balancer = phb.get_balancer(model.eval())
    with balancer.evaluation(), torch.no_grad():
        model(**batch_of_rank(model, dist.get_rank()), use_cache=False)
        by_hand = [balancer.eval_metrics(per_layer=16) for _ in range(3)]
    return by_trainer, by_hand


def test_evaluations_on_two_ranks_cover_the_tokens_of_both(tmp_path):
    """Those of `Trainer.evaluate()`, and those that are read more than once."""
    by_rank = in_ranks(evaluate_on_ranks, 2, str(tmp_path))
    model = tiny_model("mixtral")
    batches = [batch_of_rank(model, rank) for rank in range(2)]
    everything = pad(list(evaluation_set()))
    with torch.no_grad():
        of_trainer, *of_ranks = [forward(model, batch)[1] for batch in (everything, *batches)]
    figures = naive_figures({name: router.counts.tolist() for name, router in of_trainer.items()})
    by_hand = naive_figures({name: sum(part[name].counts for part in of_ranks).tolist() for name in of_trainer})
    for logged, (once, *again) in by_rank:
        assert {name: logged[f"eval_moe/{name}"] for name in figures} == pytest.approx(figures, rel=1e-5, abs=1e-6)
        assert logged["eval_moe/tokens"] == tokens_of(everything)
        assert again == [once, once]
        assert {name: once[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-5, abs=1e-6)
        assert once["tokens"] == tokens_of(*batches)


# ---------------------------------------------------------------------- two groups of two ranks


OF_GROUPS = [phb.PhiBalanceConfig(coef=2.0, bias_coef=0.01), phb.PhiBalanceConfig(coef=1.0, bias_coef=0.02)]
RATE = 0.1


def steps_of_group(model, group):
    """Two steps, each of a batch for either rank of the group; those of different ranks have different sizes."""
    shapes = ((2, 8), (3, 6)) if group == 0 else ((4, 5), (2, 11))
    return [
        [tiny_batch(model, *shape, seed=100 * group + 10 * step + i) for i, shape in enumerate(shapes)]
        for step in range(2)
    ]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_in_groups():
    group, place = divmod(dist.get_rank(), 2)
    model = tiny_model("mixtral").train()
    balancer = phb.get_balancer(phb.patch(model, OF_GROUPS[group]))
    balancer.process_group = ranks = dist.new_subgroups(2)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = steps_of_group(model, group)
    for batches in steps:
        labels = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        balancer.begin_step([batches[place]])
        (model(**batches[place]).loss * 2 * labels[place] / sum(labels)).backward()
        for p in model.parameters():  # the mean over the group, as DDP takes it
            dist.all_reduce(p.grad, group=ranks)
            p.grad /= 2
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    found = {
        "weights": {"all": flat(model)},
        "prices": balancer.prices(),
        "biases": balancer.biases(),
        "probs": balancer.means("probs"),
        "load": balancer.means("load"),
    }
    tokens = [balancer.metrics()["tokens"]]
    with balancer.evaluation(), torch.no_grad():
        model.eval()(**steps[0][place], use_cache=False)
        tokens.append(balancer.eval_metrics()["tokens"])
    return {kind: {name: value.numpy() for name, value in values.items()} for kind, values in found.items()}, tokens


def test_each_of_two_groups_behaves_as_a_run_of_two_ranks():
    """Other configurations and batches in either group: each ends where the naive loop over its two batches does."""
    by_rank = in_ranks(train_in_groups, 4)
    for rank, (found, tokens) in enumerate(by_rank):
        model, config = tiny_model("mixtral").train(), OF_GROUPS[rank // 2]
        steps = steps_of_group(model, rank // 2)
        start = flat(model)
        last = naive_training(model, steps, config, RATE)[-1]
        expected = {
            "weights": {"all": flat(model)},
            "prices": last["prices"],
            "biases": last["biases"],
            **last["means"],
        }
        assert (flat(model) - start).abs().max() > 0.01
        for kind, values in expected.items():
            for name, value in values.items():
                torch.testing.assert_close(torch.from_numpy(found[kind][name]), value, rtol=1e-4, atol=2e-5)
        assert tokens == [tokens_of(*steps[-1]), tokens_of(*steps[0])]
