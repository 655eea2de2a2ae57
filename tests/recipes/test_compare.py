"""The comparison of methods: its text and streams, what it measures, its results file, and a micro plan from end to end."""

import importlib
import itertools
import json
import math
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from paths import DATA, ROOT

import hf_phibalance as phb


RECIPES = ROOT / "recipes"
MODULES = ("compare", "loop", "measures", "models", "plans", "records", "streams", "tables")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def house():
    """The modules of the recipe by name, importable as the script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES / "compare")
        patch.syspath_prepend(RECIPES)
        yield {name: importlib.import_module(name) for name in MODULES}


@pytest.fixture(scope="module")
def documents():
    """Made-up documents of three domains, each with words of its own and a number that says which document it is."""
    words = {"problems": "apples pens 3 4 = 12", "prose": "the river and the town", "python": "def self return import"}
    return {
        domain: [" ".join(f"{text} {domain}{i}" for _ in range(12)) for i in range(120)]
        for domain, text in words.items()
    }


@pytest.fixture(scope="module")
def corpus(house, documents, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(house["streams"], "read_documents", lambda source: documents)
        return house["streams"].build_corpus("made up", 16, 300, 12, tmp_path_factory.mktemp("text"))


def small_run(house, **fields):
    fields = {"model": "mixtral", "stream": "mixed", "seed": 0, "method": {"method": "none"}, "steps": 8} | fields
    sizes = {
        "hidden_size": 32,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_local_experts": 8,
    }
    return house["loop"].Run(**{"rows": 6, "window": 16, "model_fields": sizes, "corpus": "x"} | fields)


# ---------------------------------------------------------------------- text


def test_documents_are_held_out_as_a_whole(house, documents):
    split = house["streams"].split_documents
    for texts in documents.values():
        train, held_out = split([*texts, *texts[:30]])  # duplicates must not end up in both parts
        assert not set(train) & set(held_out)
        assert sorted([*train, *held_out]) == sorted(set(texts))
        assert 0.1 <= sum(map(len, held_out)) / sum(map(len, texts)) <= 0.12
    # a document keeps its place in the order whatever else is there
    fewer = split(documents["prose"][:60], held_out=0.5)
    more = split(documents["prose"], held_out=0.5)
    order = [text for part in (more[1], more[0]) for text in part if text in documents["prose"][:60]]
    assert order == [*fewer[1], *fewer[0]]
    assert len(split(documents["prose"], most_characters=2000)[0]) < 10
    with pytest.raises(ValueError, match="needs at least 2"):
        split(["one", "one"])


def test_windows_hold_the_documents_in_order(house, corpus, documents):
    train, _ = house["streams"].split_documents(documents["prose"])
    tokenizer = house["streams"].train_tokenizer([documents["prose"]], 300)
    windows = house["streams"]._windows(tokenizer, train, 16)
    ids = [i for text in train for i in [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]]
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    parts = tokenizer.decode(windows.flatten().tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert parts[:-1] == train[: len(parts) - 1]
    assert set(corpus.train) == set(corpus.validation) == set(documents)
    assert all(rows.shape == (12, 16) for rows in corpus.validation.values())


def test_no_held_out_text_is_trained_on(corpus):
    """Every 16 tokens of the made-up documents say which document they are from."""
    for domain in corpus.train:
        seen = {tuple(row) for row in corpus.train[domain].tolist()}
        assert not seen & {tuple(row) for row in corpus.validation[domain].tolist()}


def test_corpus_is_cached_and_told_apart(house, documents, tmp_path, monkeypatch):
    streams = house["streams"]
    monkeypatch.setattr(streams, "read_documents", lambda source: documents)
    first = streams.build_corpus("made up", 16, 300, 12, tmp_path)
    monkeypatch.setattr(streams, "train_tokenizer", None)  # must not be needed again
    again = streams.build_corpus("made up", 16, 300, 12, tmp_path)
    loaded = streams.load_corpus(first.fingerprint, tmp_path)
    for other in (again, loaded):
        assert other.fingerprint == first.fingerprint
        assert all(torch.equal(other.train[domain], first.train[domain]) for domain in first.train)
    with pytest.raises(TypeError):
        streams.build_corpus("made up", 8, 300, 12, tmp_path)


def test_missing_data_names_the_remedy(house, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gsm8k/train\.jsonl.*built-in"):
        house["streams"].read_documents(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not there")
def test_real_articles(house):
    texts = house["streams"].read_documents(DATA)
    assert len(texts["problems"]) == 7473
    articles = texts["prose"]
    assert 50 <= len(articles) <= 70  # 60 articles in the validation part of WikiText-2
    assert articles[0].startswith("= Homarus gammarus =")
    assert all(text.splitlines()[0].count("=") == 2 for text in articles)
    assert "\n = = " in articles[0] or "= = " in articles[0]  # its sections stay in it


# ---------------------------------------------------------------------- streams


def test_schedules(house):
    streams = house["streams"]
    for rows in (6, 9, 10):
        mixed = streams.schedule("mixed", 30, rows)
        assert all(sum(counts) == rows and min(counts) >= rows // 3 for counts in mixed)
        assert [sum(column) for column in zip(*mixed)] == [10 * rows] * 3
        blocked = streams.schedule("blocked", 30, rows)
        assert [max(counts) for counts in blocked] == [rows] * 30
        assert [counts.index(rows) for counts in blocked] == [0, 1, 2] * 10
    shift = streams.schedule("shift", 20, 9)
    assert shift == [(4, 4, 1)] * 10 + [(1, 1, 7)] * 10
    with pytest.raises(ValueError, match="mixed"):
        streams.schedule("other", 1, 9)
    with pytest.raises(ValueError, match="rows"):
        streams.schedule("mixed", 1, 2)


def test_batches_follow_the_schedule_and_the_seed(house, corpus):
    streams = house["streams"]
    home = {tuple(row): domain for domain, rows in corpus.train.items() for row in rows.tolist()}
    for stream in streams.STREAMS:
        batches = list(streams.batches(corpus, stream, 12, 9, seed=3))
        for ids, counts in zip(batches, streams.schedule(stream, 12, 9)):
            found = Counter(home[tuple(row)] for row in ids.tolist())
            assert [found[domain] for domain in streams.DOMAINS] == list(counts)
        again = list(streams.batches(corpus, stream, 12, 9, seed=3))
        other = list(streams.batches(corpus, stream, 12, 9, seed=4))
        assert all(map(torch.equal, batches, again))
        assert not any(map(torch.equal, batches, other))
    # every window once before any comes again
    count = len(corpus.train["prose"])
    rows = [tuple(row) for ids in streams.batches(corpus, "blocked", 3 * 2 * count, 1, 0) for row in ids.tolist()]
    prose = [row for row in rows if home[row] == "prose"]
    every = Counter(map(tuple, corpus.train["prose"].tolist()))
    assert Counter(prose[:count]) == Counter(prose[count:]) == every
    assert prose[:count] != prose[count:]


# ---------------------------------------------------------------------- measures


def test_mutual_information_against_its_definition(house):
    counts = torch.randint(0, 30, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    counts[0, 0, :3] = 0
    expected = []
    for layer in range(4):
        joint = np.array([counts[d, layer].numpy() / counts[d, layer].sum().item() / 3 for d in range(3)])
        terms = [
            joint[d, e] * math.log2(joint[d, e] / (joint[d].sum() * joint[:, e].sum()))
            for d, e in itertools.product(range(3), range(6))
            if joint[d, e] > 0
        ]
        expected.append(sum(terms))
    found = house["measures"].mutual_information(counts)
    assert np.allclose(found, expected, atol=1e-12)
    apart = torch.eye(3).repeat_interleave(2, 1)[:, None] * 5  # every domain has two experts of its own
    assert house["measures"].mutual_information(apart).item() == pytest.approx(math.log2(3))
    assert house["measures"].mutual_information(torch.ones(3, 1, 6)).item() == pytest.approx(0, abs=1e-12)


def test_changed_share_against_sets(house):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: [torch.rand(50, 8, generator=generator).topk(3).indices for _ in range(2)]  # noqa: E731
    before, after = draw(), draw()
    kept = sum(len(set(a) & set(b)) for old, new in zip(before, after) for a, b in zip(old.tolist(), new.tolist()))
    assert house["measures"].changed_share(before, after) == pytest.approx(1 - kept / 300)
    assert house["measures"].changed_share(before, [chosen.flip(-1) for chosen in before]) == 0


def test_counts_and_balance_against_loops(house):
    """Three domains, 8 windows of 5 tokens, two layers, 6 experts, top-2, batches of 4 windows."""
    measures = house["measures"]
    generator = torch.Generator().manual_seed(2)
    choices = [[torch.rand(40, 6, generator=generator).topk(2).indices for _ in range(2)] for _ in range(3)]
    counts = torch.stack([measures.count_by_window(chosen, 8, 6) for chosen in choices])
    naive = [
        [[Counter(choices[d][layer][5 * w : 5 * w + 5].flatten().tolist()) for layer in range(2)] for w in range(8)]
        for d in range(3)
    ]
    for d, w, layer, e in itertools.product(range(3), range(8), range(2), range(6)):
        assert counts[d, w, layer, e] == naive[d][w][layer][e]

    def vio(windows):
        found = []
        for layer in range(2):
            load = sum((naive[d][w][layer] for d, w in windows), Counter())
            found.append(max(load.values()) / (sum(load.values()) / 6) - 1)
        return found

    everything = vio(list(itertools.product(range(3), range(8))))
    figures = measures.balance_figures(counts, rows=4)
    assert figures["max_vio_global"] == pytest.approx(np.mean(everything))
    assert figures["max_vio_worst_layer"] == pytest.approx(max(everything))
    mixed = [np.mean(vio([(d, w) for d in range(3)])) for w in range(8)]
    single = [np.mean(vio([(d, w) for w in range(i, i + 4)])) for d in range(3) for i in (0, 4)]
    assert figures["max_vio_mixed_batch"] == pytest.approx(np.mean(mixed))
    assert figures["max_vio_domain_batch"] == pytest.approx(np.mean(single))


def test_recovery_and_thinning(house):
    recover, thin = house["measures"].steps_to_recover, house["measures"].thin
    before = [9.0] * 20 + [1.0] * 20  # only the second half counts
    assert recover([*before, *[1.2] * 30], 40, smooth=5) == 0
    assert recover([*before, *[2.0] * 30], 40, smooth=5) == 30
    jump = [2.0] * 12 + [1.0] * 18  # the mean of five steps is at most 1.25 from the fourth step at 1.0 on
    assert recover([*before, *jump], 40, smooth=5) == 16
    assert thin([1.0, 3.0, 5.0, 7.0, 9.0], 3) == [2.0, 6.0, 9.0]
    assert thin(list(range(12)), 5, multiple=3) == [1.0, 4.0, 7.0, 10.0]
    assert thin([1.0, 2.0], 50) == [1.0, 2.0]


def test_paired_statistics_against_numpy(house):
    rng = np.random.default_rng(0)
    tables = house["tables"]
    for count in (2, 3, 5, 10, 14):
        base = dict(enumerate(rng.normal(4.0, 0.5, count).tolist()))
        values = {seed: value + rng.normal(0.02, 0.02) for seed, value in base.items()} | {99: 1.0}
        differences = np.array([values[seed] - base[seed] for seed in base])
        mean, spread, told = tables.paired_difference(values, base)
        assert mean == pytest.approx(differences.mean())
        assert spread == pytest.approx(differences.std(ddof=1))
        quantile = pytest.importorskip("scipy.stats").t.ppf(0.975, count - 1) if count <= 10 else 1.96
        assert told == (abs(differences.mean()) > quantile * differences.std(ddof=1) / math.sqrt(count))
        assert tables.mean_spread(list(base.values())) == pytest.approx(
            (np.mean(list(base.values())), np.std(list(base.values()), ddof=1))
        )
    mean, spread, told = tables.paired_difference({0: 1.0}, {0: 3.0})
    assert mean == -2.0 and math.isnan(spread) and not told
    with pytest.raises(ValueError, match="no seed in common"):
        tables.paired_difference({0: 1.0}, {1: 1.0})


# ---------------------------------------------------------------------- runs


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

    def sets():
        """The top-k of the biased probabilities, from the router's logits and the bias, token by token."""
        seen = {}
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
        biases = balancer.biases()
        return [set(row) for name, p in seen.items() for row in (p + biases[name]).topk(2).indices.tolist()]

    optimizer = torch.optim.AdamW(house["loop"].parameter_groups(model, 0.1), lr=run.learning_rate, betas=(0.9, 0.95))
    shares = []
    for step, ids in enumerate(house["streams"].batches(corpus, "mixed", 8, 6, 0)):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * house["loop"].lr_factor(step, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        before = sets()
        balancer.step()
        if step >= 6:  # the last quarter
            shares.append(sum(len(b - a) for b, a in zip(before, sets())) / (2 * len(before)))
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
    assert house["loop"].key_of(run.settings | {"corpus": "another"}) == run.key


# ---------------------------------------------------------------------- plans and results


def test_expansion_of_methods(house):
    expand = house["plans"].expand
    entry = {"label": "φ {coef}", "coef": [0.1, 0.2], "ema_rate": [0.3, 0.5], "track": "load"}
    found = [(m.label, m.family, m.arguments) for m in expand(entry)]
    assert found == [
        (f"φ {coef} ema_rate={rate}", "φ {coef}", {"coef": coef, "ema_rate": rate, "track": "load"})
        for coef in (0.1, 0.2)
        for rate in (0.3, 0.5)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plans: {a: {methods: [{label: x, cof: 1}]}}", "plan 'a', method 'x'.*cof"),
        ("plans: {a: {methods: [{label: x, coef: -1}]}}", "plan 'a', method 'x'.*coef"),
        ("plans: {a: {methods: [{label: x}, {label: x}]}}", "two methods have the label 'x'"),
        ("plans: {a: {baseline: y, methods: [{label: x}]}}", "`baseline` is 'y'"),
        ("plans: {a: {models: [gpt], methods: [{label: x}]}}", "`models` has 'gpt'"),
        ("plans: {a: {stepps: 3, methods: [{label: x}]}}", "unknown field 'stepps'"),
        ("plans: {a: {micro_batches: 20, methods: [{label: x}]}}", "`micro_batches`"),
        ("plans: {a: {}}", "`methods` is missing"),
        ("plans: {}", "must hold a mapping with `plans`"),
    ],
)
def test_bad_plans_are_refused(house, tmp_path, text, message):
    path = tmp_path / "plans.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        house["plans"].load_plans(path)


def test_plans_that_ship_are_valid(house):
    paths = sorted((RECIPES / "compare").glob("*.yaml"))
    assert paths
    for path in paths:
        for plan in house["plans"].load_plans(path)[1]:
            assert list(plan.runs()), path


def test_results_survive_a_cut_line(house, tmp_path):
    path = tmp_path / "results.jsonl"
    runs = [small_run(house, seed=seed) for seed in range(3)]
    records = [{"key": run.key, "settings": run.settings, "metrics": {"loss": run.seed}} for run in runs]
    results = house["records"].Results(path)
    results.add(records[0])
    results.add(records[1])
    path.write_bytes(path.read_bytes()[:-40])  # killed while writing
    with pytest.warns(UserWarning, match="line 2 is no result"):
        results = house["records"].Results(path)
    assert runs[0] in results and runs[1] not in results and len(results) == 1
    results.add(records[2])
    with pytest.warns(UserWarning, match="line 2 is no result"):
        results = house["records"].Results(path)
    assert [run in results for run in runs] == [True, False, True]
    other = small_run(house, seed=0, corpus="other text")
    assert other not in results and results.get(small_run(house, seed=0, corpus="")) == records[0]


def test_table_of_made_up_results(house, tmp_path):
    """Means, spreads, paired differences, a run that diverged, and the best of a family, against numpy."""
    plans, tables = house["plans"], house["tables"]
    methods = [
        method
        for entry in ({"label": "none", "method": "none"}, {"label": "φ {coef}", "family": "φ", "coef": [0.1, 0.2]})
        for method in plans.expand(entry)
    ]
    plan = plans.Plan(name="made-up", methods=methods, baseline="none", streams=["mixed"])
    results = house["records"].Results(tmp_path / "results.jsonl")
    losses = {"none": [4.0, 4.2, 4.1], "φ 0.1": [3.9, 4.11, 4.02], "φ 0.2": [3.8, None, 4.3]}
    for run, (seed, label) in zip(plan.runs(), itertools.product(range(3), losses)):
        loss = losses[label][seed]
        figures = {column.name: 0.5 for column in (*tables.COLUMNS, *tables.MORE_COLUMNS)} | {"loss": loss}
        if seed == 1:
            del figures["gini"]  # as an earlier version wrote it
        figures = {"diverged_at": 7} if loss is None else figures
        results.add({"key": run.key, "settings": run.settings, "metrics": figures, "curve": {}, "experts": []})
    (path,) = tables.write_tables(plan, results, tmp_path)
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]
    difference = np.array(losses["φ 0.1"]) - np.array(losses["none"])
    assert rows[2][:4] == ["| none", "3", f"{np.mean(losses['none']):.3f} ± 0.100", ""]
    assert rows[3][3] == f"{difference.mean():+.3f} ± {difference.std(ddof=1):.3f} *"
    assert rows[4][1] == "2, 1 diverged"
    assert rows[4][3].startswith("+0.000 ± 0.283")
    assert "2 settings of *φ*: loss 4.010 with `φ 0.1`" in path.read_text()
    taken_together = tables.summary(plan, tables.finished(plan, results)).splitlines()
    error = difference.std(ddof=1) / 3**0.5
    assert taken_together[2] == f"| φ 0.1 | 3 | {difference.mean():+.4f} ± {error:.4f} | 3 | 1.00 | 0 |"
    assert taken_together[3].startswith("| φ 0.2 | 2 | +0.0000 ± 0.2000 | 1 |")


# ---------------------------------------------------------------------- the command


PLAN = """
defaults: {models: [mixtral], streams: [mixed], steps: 12, rows: 3, window: 16, vocab_size: 300, validation_windows: 12}
plans:
  micro:
    question: Does it run?
    seeds: [0, 1]
    methods: [{label: φ bias, coef: 0.0, bias_coef: 0.01}]
"""


def test_the_tables_of_the_readme_follow_from_the_committed_runs(house):
    folder = RECIPES / "compare"
    _, plans = house["plans"].load_plans(folder / "main.yaml")
    results = house["records"].Results(folder / "results" / "main.jsonl")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- /table -->") > 5
    assert house["tables"].refresh(text, plans, results) == text
    with pytest.raises(ValueError, match="nothing, blocked"):
        house["tables"].refresh("<!-- table: nothing, blocked -->\n<!-- /table -->", plans, results)


def test_micro_plan_whose_worker_is_killed(house, tmp_path, monkeypatch, capsys):
    """The command from end to end: its worker is killed in the first run; then nothing is left to do."""
    compare, streams = house["compare"], house["streams"]
    sources = streams._python_sources
    monkeypatch.setattr(streams, "_python_sources", lambda: sources()[:40])  # less to read
    (tmp_path / "plans.yaml").write_text(PLAN)
    killed = []
    array = compare.RawArray

    def watched(kind, count):
        steps_done = array(kind, count)

        def kill():
            while not any(steps_done):
                time.sleep(0.01)
            for child in psutil.Process().children(recursive=True):
                if child.ppid() != os.getpid():  # the server that forks the workers is ours, they are its children
                    killed.append(child.pid)
                    os.kill(child.pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        return steps_done

    monkeypatch.setattr(compare, "RawArray", watched)
    command = [str(tmp_path / "plans.yaml"), "--data", "built-in", "--output_dir", str(tmp_path / "out")]
    assert compare.main(command) == 0
    assert len(killed) == 1
    said = capsys.readouterr().out
    assert "2 runs, 0 of them finished" in said and "A worker was killed" in said
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["seed"] for line in lines] == [0, 1]
    table = (tmp_path / "out" / "micro.md").read_text()
    assert table.startswith("# Does it run?") and "| φ bias | 2 |" in table
    for name in ("frontier", "curves", "experts"):
        assert (tmp_path / "out" / f"micro-mixtral-{name}.png").stat().st_size > 5000

    monkeypatch.setattr(compare, "RawArray", None)  # no pool is needed any more
    assert compare.main(command) == 0
    assert "2 of them finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.jsonl").read_text().splitlines() == lines
    (tmp_path / "out" / "micro.md").unlink()
    monkeypatch.setattr(streams, "read_documents", None)  # tables need no text
    assert compare.main([*command, "--tables", "--seeds", "1"]) == 0
    assert "| φ bias | 1 |" in (tmp_path / "out" / "micro.md").read_text()
