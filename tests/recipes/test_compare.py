"""recipes/compare: plans, results, text, figures and runs from scratch. Fine-tuning is in test_compare_finetune."""

import itertools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from comparison import harness, load_command, measures, models, scratch, small_run, tables, text, training
from hostile import CALM, damaged
from hypothesis import given
from hypothesis import strategies as st
from paths import DATA, ROOT

import hf_phibalance as phb


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def documents():
    """Documents of three domains. Every few words of a document say which one it is."""
    words = {"problems": "apples pens 3 4 = 12", "prose": "the river and the town", "python": "def self return import"}
    return {
        domain: [" ".join(f"{said} {domain}{i}" for _ in range(12)) for i in range(120)]
        for domain, said in words.items()
    }


@pytest.fixture(scope="module")
def corpus(documents, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "read_documents", lambda source: documents)
        return text.build_corpus("made up", 16, 300, 12, tmp_path_factory.mktemp("text"))


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("page, name", [("README.md", "main"), ("FINETUNING.md", "finetune"), ("REAL.md", "real")])
def test_tables_of_a_page_follow_from_the_committed_runs(page, name):
    folder = ROOT / "recipes" / "compare"
    _, plans = harness.load_plans(folder / f"{name}.yaml")
    results = harness.Results(folder / "results" / f"{name}.jsonl")
    document = (folder / page).read_text(encoding="utf-8")
    assert document.count("<!-- table: ") == document.count("<!-- /table -->") > 1
    assert tables.refresh(document, plans, results) == document
    for mark in ("nothing; full", f"{plans[0].name}; nothing"):
        with pytest.raises(ValueError, match="asks for no table"):
            tables.refresh(f"<!-- table: {mark} -->\n<!-- /table -->", plans, results)


def test_tables_of_made_up_results(tmp_path):
    """Means, spreads, paired differences and a run that diverged, against numpy."""
    entries = ({"label": "none", "method": "none"}, {"label": "φ {coef}", "coef": [0.1, 0.2]})
    axes = {"models": {"mixtral": "mixtral"}, "streams": {"mixed": "mixed"}}
    methods = [method for entry in entries for method in harness.expand(entry)]
    plan = harness.Plan(name="made-up", kind="scratch", axes=axes, methods=methods)
    results = harness.Results(tmp_path / "results.jsonl")
    losses = {"none": [4.0, 4.2, 4.1], "φ 0.1": [3.9, 4.11, 4.02], "φ 0.2": [3.8, None, 4.3]}
    for run, (seed, label) in zip(plan.runs(), itertools.product(range(3), losses)):
        loss = losses[label][seed]
        figures = {"diverged_at": 7} if loss is None else {"loss": loss, "max_vio_global": 0.5}
        results.add({"key": run.key, "settings": run.settings, "metrics": figures, "curve": {}, "experts": []})
    difference = np.array(losses["φ 0.1"]) - np.array(losses["none"])
    found = harness.finished(plan, results)
    none, first, second = tables.make(plan, results, "mixtral; mixed", found).splitlines()[2:]
    assert none.startswith(f"| none | 3 | {np.mean(losses['none']):.3f} ± 0.100 |  | 0.500 ± 0.000 |")
    assert f"| {difference.mean():+.3f} ± {difference.std(ddof=1):.3f} * |" in first
    assert second.startswith("| φ 0.2 | 2, 1 diverged |") and "| +0.000 ± 0.283 |" in second
    *_, first, second = tables.make(plan, results, "all", found).splitlines()
    error = difference.std(ddof=1) / 3**0.5
    assert first == f"| φ 0.1 | 3 | {difference.mean():+.4f} ± {error:.4f} | 3 | 1.00 | 0 |"
    assert second.startswith("| φ 0.2 | 2 | +0.0000 ± 0.2000 | 1 |")
    (path,) = tables.write_tables(plan, results, tmp_path)
    assert first not in path.read_text() and none in path.read_text()  # one cell has no summary


def test_what_is_told_from_0_against_scipy():
    t = pytest.importorskip("scipy.stats").t
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 10, 26, 60):
        values = rng.normal(0.02, 0.02, count)
        spread = values.std(ddof=1)
        wanted = abs(values.mean()) > t.ppf(0.975, count - 1) * spread / math.sqrt(count)
        assert tables.is_told(values.mean(), spread, count) == wanted
    assert not tables.is_told(-2.0, math.nan, 1)


# ---------------------------------------------------------------------- plans and results


def test_lists_of_a_method_are_multiplied_out():
    entry = {"label": "φ {coef}", "coef": [0.1, 0.2], "ema_rate": [0.3, 0.5], "track": "load"}
    assert [(m.label, m.family, m.arguments) for m in harness.expand(entry)] == [
        (f"φ {coef} ema_rate={rate}", "φ {coef}", {"coef": coef, "ema_rate": rate, "track": "load"})
        for coef in (0.1, 0.2)
        for rate in (0.3, 0.5)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("plans: {a: {methods: [{label: x, cof: 1}]}}", "plan 'a', method 'x'.*cof"),
        ("plans: {a: {methods: [{label: x, coef: -1}]}}", "plan 'a', method 'x'.*coef"),
        ("plans: {a: {methods: [{label: x}, {label: x}]}}", "two methods have the label 'x'"),
        ("plans: {a: {baseline: y, methods: [{label: x}]}}", "`baseline` is 'y'"),
        ("plans: {a: {models: [gpt], methods: [{label: x}]}}", "`models` has 'gpt'"),
        ("plans: {a: {stepps: 3, methods: [{label: x}]}}", "unknown field 'stepps'"),
        ("plans: {a: {micro_batches: 20, methods: [{label: x}]}}", "`micro_batches`"),
        ("plans: {a: {}}", "`methods` is missing"),
        ("default: {}\nplans: {a: {methods: [{label: x}]}}", "unknown key 'default'; known are defaults, kind"),
        ("kind: os\nplans: {a: {methods: [{label: x}]}}", "`kind` is 'os'; choose from scratch, finetune"),
        ("kind: real\nplans: {a: {methods: [{label: x}]}}", "the key 'starts' is missing; `kind: real` needs it"),
        ("plans: {}", "must hold a mapping with `plans`"),
        ("plans: {../a: {methods: [{label: x}]}}", "the plan '../a' cannot name a file"),
        ("plans: !!python/object/apply:os.makedirs ['made']", "python/object"),
        ("kind: finetune\nbases: {a: {modl: x}}\nplans: {a: {methods: [{label: x}]}}", "a base has a field.*modl"),
    ],
)
def test_bad_plans_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plans.yaml").write_text(content)
    with pytest.raises(Exception, match=message):
        harness.load_plans(tmp_path / "plans.yaml")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_that_ship_are_valid(path):
    for plan in harness.load_plans(path)[1]:
        trained = [getattr(run, "base", run) for run in plan.runs() if plan.kind != "real"]  # that loads a checkpoint
        for model, fields in {(one.model, json.dumps(one.model_fields)) for one in trained}:
            with torch.device("meta"):  # without memory, at whatever size
                models.build_model(model, 1024, 0, **json.loads(fields))


def test_keys():
    """A result is found by everything that was read, and by nothing else."""
    key = lambda **fields: small_run(**fields).key  # noqa: E731
    base = key(method={"coef": 0.02})
    assert base == key(method={"coef": 0.02, "ema_rate": phb.PhiBalanceConfig().ema_rate})
    assert base == key(method={"coef": 0.02, "method": "phi", "bias_coef": 0.0}, corpus="other")
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


def record_of(run, **changes):
    return {"key": run.key, "settings": run.settings, "metrics": {"loss": 1.0}, "curve": {}, "experts": [], **changes}


def test_results_survive_a_cut_line(tmp_path):
    path = tmp_path / "results.jsonl"
    runs = [small_run(seed=seed) for seed in range(3)]
    results = harness.Results(path)
    results.add(record_of(runs[0]))
    results.add(record_of(runs[1]))
    path.write_bytes(path.read_bytes()[:-40])  # killed while writing
    with pytest.warns(UserWarning, match="line 2 is no result"):
        results = harness.Results(path)
    results.add(record_of(runs[2]))
    with pytest.warns(UserWarning, match="line 2 is no result"):
        results = harness.Results(path)
    assert [run in results for run in runs] == [True, False, True] and len(results) == 2
    other = small_run(seed=0, corpus="other text")
    assert other not in results and results.get(small_run(seed=0, corpus="")) == record_of(runs[0])
    later = small_run(seed=0)
    later_settings = {**later.settings, "new_setting": 1}  # of a later version: kept, and another run
    results.add(record_of(later, settings=later_settings, metrics={"loss": 2.0}))
    assert results.get(later)["metrics"] == {"loss": 1.0} and len(results) == 3


@CALM
@given(data=st.data())
def test_a_damaged_line_harms_no_other(data, tmp_path_factory):
    runs = [small_run(seed=seed) for seed in range(3)]
    lines = [json.dumps(record_of(run)).encode() for run in runs]
    lines[1] = data.draw(st.one_of(damaged(lines[1]), st.binary(max_size=40), st.just(b"[" * 500_000)))
    path = tmp_path_factory.getbasetemp() / "results.jsonl"
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b"\n", b" "), lines[2]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = harness.Results(path)
    assert runs[0] in results and runs[2] in results
    figures = (results.get(runs[1]) or {"metrics": {}})["metrics"].values()
    assert all(type(value) in (int, float) for value in figures)


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_a_text_that_cannot_be_read(corpus, kind, tmp_path):
    """That nothing is unpickled is tested in test_no_foreign_code."""
    path = tmp_path / "corpus-x.pt"
    torch.save(vars(corpus) if kind == "damaged" else {"something": torch.zeros(3)}, path)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"corpus-x\.pt cannot be read.*remove it, and it is made again"):
        text.load_corpus("x", tmp_path)


# ---------------------------------------------------------------------- the command

PLANS = """
defaults: {models: [mixtral], streams: [mixed], steps: 12, rows: 3, window: 16, vocab_size: 300, validation_windows: 12}
plans:
  micro:
    question: Does it run?
    seeds: [0, 1]
    methods: [{label: φ bias, coef: 0.0, bias_coef: 0.01}]
"""


def test_the_command_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    """A run's process is killed; it is tried again. Then nothing is left to do."""
    command, output = load_command(), tmp_path / "out"
    sources = text._python_sources
    monkeypatch.setattr(text, "_python_sources", lambda: sources()[:40])  # less to read
    (tmp_path / "plans.yaml").write_text(PLANS)
    killed = []

    def kill():
        while not killed:
            time.sleep(0.01)
            for child in psutil.Process().children(recursive=True):
                if child.ppid() != os.getpid() and not killed:  # the server that forks is ours, runs are its children
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)

    threading.Thread(target=kill, daemon=True).start()
    arguments = [str(tmp_path / "plans.yaml"), "--data", "built-in", "--output_dir", str(output)]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 runs, 0 of them finished" in said and "killed by signal 9" in said
    lines = (output / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["settings"]["seed"] for line in lines) == [0, 1]
    assert "| φ bias | 2 |" in (output / "micro.md").read_text()
    for name in ("frontier", "experts"):
        assert (output / f"micro-mixtral-{name}.png").stat().st_size > 5000

    assert command.main(arguments) == 0
    assert "2 of them finished" in capsys.readouterr().out
    assert (output / "results.jsonl").read_text().splitlines() == lines
    assert command.main([*arguments, "--list", "--seeds", "0"]) == 0
    (output / "micro.md").unlink()
    monkeypatch.setattr(text, "read_documents", None)  # tables need no text
    assert command.main([*arguments, "--report", "--seeds", "1"]) == 0
    assert "| φ bias | 1 |" in (output / "micro.md").read_text()
    with pytest.raises(SystemExit, match=r"--tasks: the plans of .* have no tasks, but models, streams"):
        command.main([*arguments, "--tasks", "near"])
    with pytest.raises(SystemExit, match="has no plan 'macro', but micro"):
        command.main([*arguments, "--plans", "macro"])


# ---------------------------------------------------------------------- text


def test_documents_are_held_out_as_a_whole(documents):
    for texts in documents.values():
        train, held_out = text.split_documents([*texts, *texts[:30]])  # duplicates must not end up in both parts
        assert not set(train) & set(held_out)
        assert sorted([*train, *held_out]) == sorted(set(texts))
        assert 0.1 <= sum(map(len, held_out)) / sum(map(len, texts)) <= 0.12
    # a document keeps its place in the order when others come
    fewer = text.split_documents(documents["prose"][:60], held_out=0.5)
    more = text.split_documents(documents["prose"], held_out=0.5)
    order = [one for part in (more[1], more[0]) for one in part if one in documents["prose"][:60]]
    assert order == [*fewer[1], *fewer[0]]
    with pytest.raises(ValueError, match="needs at least 2"):
        text.split_documents(["one", "one"])


def test_windows_hold_the_documents_in_order(corpus, documents):
    train, _ = text.split_documents(documents["prose"])
    tokenizer = text.train_tokenizer([documents["prose"]], 300)
    windows = text.windows(tokenizer, train, 16)
    ids = [i for one in train for i in [*tokenizer.encode(one).ids, tokenizer.token_to_id("<|endoftext|>")]]
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert all(rows.shape == (12, 16) for rows in corpus.validation.values())
    for domain in corpus.train:
        seen = {tuple(row) for row in corpus.train[domain].tolist()}
        assert not seen & {tuple(row) for row in corpus.validation[domain].tolist()}


def test_missing_data_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gsm8k/train\.jsonl.*built-in"):
        text.read_documents(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not there")
def test_real_articles():
    texts = text.read_documents(DATA)
    assert len(texts["problems"]) == 7473
    assert 50 <= len(texts["prose"]) <= 70  # 60 articles in the validation part of WikiText-2
    assert texts["prose"][0].startswith("= Homarus gammarus =") and "= = " in texts["prose"][0]
    assert all(article.splitlines()[0].count("=") == 2 for article in texts["prose"])


def test_schedules():
    for rows in (6, 9, 10):
        mixed = text.schedule("mixed", 30, rows)
        assert all(sum(counts) == rows and min(counts) >= rows // 3 for counts in mixed)
        assert [sum(column) for column in zip(*mixed)] == [10 * rows] * 3
        assert [counts.index(rows) for counts in text.schedule("blocked", 30, rows)] == [0, 1, 2] * 10
    assert text.schedule("shift", 20, 9) == [(4, 4, 1)] * 10 + [(1, 1, 7)] * 10
    with pytest.raises(ValueError, match="rows"):
        text.schedule("mixed", 1, 2)


def test_batches_follow_the_schedule_and_the_seed(corpus):
    home = {tuple(row): domain for domain, rows in corpus.train.items() for row in rows.tolist()}
    for stream in text.STREAMS:
        batches, again, other = (list(text.batches(corpus, stream, 12, 9, seed)) for seed in (3, 3, 4))
        for ids, counts in zip(batches, text.schedule(stream, 12, 9)):
            found = Counter(home[tuple(row)] for row in ids.tolist())
            assert [found[domain] for domain in text.DOMAINS] == list(counts)
        assert all(map(torch.equal, batches, again)) and not any(map(torch.equal, batches, other))
    # every window once before any comes again
    count = len(corpus.train["prose"])
    rows = [tuple(row) for ids in text.batches(corpus, "blocked", 3 * 2 * count, 1, 0) for row in ids.tolist()]
    prose = [row for row in rows if home[row] == "prose"]
    assert Counter(prose[:count]) == Counter(prose[count:]) == Counter(map(tuple, corpus.train["prose"].tolist()))
    assert prose[:count] != prose[count:]


# ---------------------------------------------------------------------- figures, against definitions written out


def test_domain_information():
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
    assert np.allclose(measures.domain_information(counts), expected, atol=1e-12)
    apart = torch.eye(3).repeat_interleave(2, 1)[:, None] * 5  # every domain has two experts of its own
    assert measures.domain_information(apart).item() == pytest.approx(math.log2(3))


def test_changed_share():
    generator = torch.Generator().manual_seed(1)
    draw = lambda: [torch.rand(50, 8, generator=generator).topk(3).indices for _ in range(2)]  # noqa: E731
    before, after = draw(), draw()
    kept = sum(len(set(a) & set(b)) for old, new in zip(before, after) for a, b in zip(old.tolist(), new.tolist()))
    assert measures.changed_share(before, after) == pytest.approx(1 - kept / 300)
    assert measures.changed_share(before, [chosen.flip(-1) for chosen in before]) == 0


def test_counts_and_balance():
    """Three domains, 8 windows of 5 tokens, two layers, 6 experts, top-2, batches of 4 windows."""
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
        loads = [sum((naive[d][w][layer] for d, w in windows), Counter()) for layer in range(2)]
        return [max(load.values()) / (sum(load.values()) / 6) - 1 for load in loads]

    everything = vio(list(itertools.product(range(3), range(8))))
    figures = measures.balance_figures(counts, rows=4)
    assert figures["max_vio_global"] == pytest.approx(np.mean(everything))
    assert figures["max_vio_worst_layer"] == pytest.approx(max(everything))
    mixed = [np.mean(vio([(d, w) for d in range(3)])) for w in range(8)]
    single = [np.mean(vio([(d, w) for w in range(i, i + 4)])) for d in range(3) for i in (0, 4)]
    assert figures["max_vio_mixed_batch"] == pytest.approx(np.mean(mixed))
    assert figures["max_vio_domain_batch"] == pytest.approx(np.mean(single))


def test_recovery_and_thinning():
    before = [9.0] * 20 + [1.0] * 20  # only the second half counts
    jump = [2.0] * 12 + [1.0] * 18  # the mean of five steps is at most 1.25 from the fourth step at 1.0 on
    for after, steps in (([1.2] * 30, 0), ([2.0] * 30, 30), (jump, 16)):
        assert measures.steps_to_recover([*before, *after], 40, smooth=5) == steps
    assert measures.thin([1.0, 3.0, 5.0, 7.0, 9.0], points=3) == [2.0, 6.0, 9.0]
    assert measures.thin(list(range(12)), multiple=3, points=5) == [1.0, 4.0, 7.0, 10.0]


# ---------------------------------------------------------------------- runs


def test_churn_is_what_the_duals_move(corpus):
    """Without a bias nothing moves; with one, the figure of the run is that of a replay with copied choices."""
    assert scratch.train(small_run(method={"coef": 0.1}), corpus)["metrics"]["churn"] == 0
    run = small_run(method={"coef": 0.0, "bias_coef": 0.05})
    moved = scratch.train(run, corpus)["metrics"]["churn"]
    assert moved > 0

    model = models.build_model("mixtral", corpus.vocab_size, 0, **run.model_fields)
    balancer = phb.get_balancer(phb.patch(model, run.config))
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
        with torch.no_grad():
            model.eval()(input_ids=probe)
        model.train()
        for hook in hooks:
            hook.remove()
        balancer.set_biases(present)
        return [set(row) for name, p in seen.items() for row in (p + biases[name]).topk(2).indices.tolist()]

    optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.1), lr=run.learning_rate, betas=(0.9, 0.95))
    shares = []
    for step, ids in enumerate(text.batches(corpus, "mixed", 8, 6, 0)):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * training.lr_factor(step, 8)
        biases = balancer.biases()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 6:  # the last quarter
            before, after = sets(biases), sets(balancer.biases())
            shares.append(sum(len(b - a) for b, a in zip(before, after)) / (2 * len(before)))
    assert moved == pytest.approx(np.mean(shares))


def test_figures_of_a_run(corpus):
    """The run's own bookkeeping against what its record says; the same again when it is repeated."""
    run = small_run(stream="shift", steps=24)
    record, again = scratch.train(run, corpus), scratch.train(run, corpus)
    figures = record["metrics"]
    assert json.loads(json.dumps(record)) == record
    assert figures["loss"] == pytest.approx(np.mean([figures[f"loss_{d}"] for d in corpus.validation]))
    shares = np.array(record["experts"])
    assert shares.shape == (2, 3, 8) and np.allclose(shares.sum(-1), 1, atol=1e-4)
    assert figures["max_vio_global"] == pytest.approx((shares.mean(1).max(-1) * 8 - 1).mean(), abs=1e-3)
    assert 0 <= figures["recovery_steps"] <= 12 and figures["step_ms"] > 0
    for name in ("step_ms", "run_seconds", "cpu_seconds"):
        del figures[name], again["metrics"][name]
    assert again == record


def test_methods_have_the_same_start(corpus):
    first = [
        scratch.train(small_run(steps=1, **fields), corpus)["curve"]["loss"][0]
        for fields in (
            {"method": {"method": "switch"}},
            {"method": {"coef": 0.0, "bias_coef": 0.01}},
            {"method": {"method": "none"}},
            {"seed": 1},
        )
    ]
    assert first[0] == first[1] == first[2] != first[3]


def test_micro_batches_are_one_step(corpus):
    """Switch and the global-batch loss differ only between micro-batches."""

    def losses(parts, **method):
        run = small_run(method=method, micro_batches=parts, steps=12)
        return scratch.train(run, corpus)["curve"]["loss"]

    assert losses(3, method="none") == pytest.approx(losses(1, method="none"), abs=2e-4)
    assert losses(1, method="switch", coef=1.0) == losses(1, method="global_batch", coef=1.0)
    assert losses(3, method="switch", coef=1.0) != losses(3, method="global_batch", coef=1.0)


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3", "deepseek_v2"])
def test_the_other_models_train(corpus, model):
    record = scratch.train(small_run(model=model, model_fields={}, steps=4), corpus)
    assert record["metrics"]["loss"] < 2 * math.log(corpus.vocab_size)


def test_divergence_is_recorded(corpus):
    record = scratch.train(small_run(learning_rate=1e20), corpus)
    assert 1 <= record["metrics"].pop("diverged_at") <= 8 and not record["metrics"]
