"""recipes/compare, fine-tuning: exercises and their scores, what trains, a run against a loop of torch alone, tables."""

import dataclasses
import itertools

import pytest
import torch
from comparison import exercises, finetune, harness, load_command, tables, text, training

import hf_phibalance as phb


pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
RATES = dict.fromkeys(finetune.WAYS, 0.003) | {"full": 0.001}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Little text and few exercises."""
    words = [f"the river {n} and the town {n * 7} " * 40 for n in range(140)]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "read_documents", lambda source: {"prose": words, "problems": words})
        patch.setattr(finetune, "HELD_OUT_WINDOWS", 8)
        patch.setattr(exercises, "HELD_OUT", 8)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def material(folder):
    return finetune.build_material("built-in", folder)


@pytest.fixture(scope="module")
def base(material, folder):
    fields = {"model_fields": SMALL, "steps": 4, "rows": 2, "material": material.fingerprint}
    base = finetune.Base(name="small", model="mixtral", method={"method": "none"}, **fields)
    base.train(folder)
    return base


def tuning(base, **fields):
    default = {"task": "near", "way": "full", "method": {"method": "none"}, "steps": 3, "tokens": 200}
    shared = {"base": base, "corpus": base.material, "learning_rates": RATES}
    return finetune.Run(**shared, **{**default, **fields})


def test_made_functions_pass_their_checks():
    for exercise in exercises.functions(None).held_out[:3]:
        judge = lambda answer, e=exercise: finetune.is_function(e.prompt, answer, e.reference)  # noqa: E731
        assert judge(exercise.completion + "\nprint(1)")
        assert not judge("    return None\n") and not judge("    return (\n")


def test_made_problems_are_scored_by_their_answer():
    exercise = exercises.near(None).held_out[0]
    judge = lambda answer: finetune.is_answer(exercise.prompt, answer, exercise.reference)  # noqa: E731
    assert judge(exercise.completion + "\n\nQuestion: #### 1") and not judge(" #### 1000")


@pytest.mark.parametrize("name", exercises.MADE)
def test_no_exercise_is_in_two_parts(name):
    task = exercises.EXERCISES[name](None)
    parts = [{e.prompt for e in part} for part in (task.train, task.held_out, task.base)]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))


def test_only_completions_are_learnt_and_padding_is_marked():
    batch = finetune.collate([([5, 6, 7, 8], 2), ([9, 10], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 10, -100, -100]]


def test_a_run_is_plain_fine_tuning(material, base, folder):
    """Without balancing, the same as a loop of torch alone."""
    run = tuning(base, micro_batches=2)
    record, model, task = run.train(folder), base.load(material, folder), material.tasks["near"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors}]
    optimizer = torch.optim.AdamW(groups, lr=0.001, betas=(0.9, 0.95), weight_decay=0)

    def loss_of(batch, reduction):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction=reduction), labels

    for step, rows in zip(range(3), finetune.exercises(task, run)):
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * training.lr_factor(step, 3)
        loss_of(finetune.collate(rows), "mean")[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    losses, count = 0.0, 0
    for batch in finetune.held_out_batches(task):
        loss, labels = loss_of(batch, "sum")
        losses, count = losses + float(loss.detach()), count + int((labels != -100).sum())
    assert record["metrics"]["loss"] == pytest.approx(losses / count, rel=2e-4)
    assert len(record["curve"]["first_gradient_norm"]) == 3


@pytest.mark.parametrize("way", finetune.WAYS)
def test_each_way_trains_what_it_says(material, base, folder, way):
    model = phb.patch(base.load(material, folder), phb.PhiBalanceConfig())
    names = {n for n, p in finetune.prepare(model, way, 4, 0).named_parameters() if p.requires_grad}
    routers = {name for name in names if ".gate." in name}
    adapters = {name for name in names if "lora_" in name}
    assert bool(routers) == (way != "LoRA")
    assert bool(adapters) == way.startswith("LoRA")
    assert (names == routers) == (way == "router")
    assert bool(routers & adapters) == (way == "LoRA, router by LoRA")


def test_a_run_without_steps_is_the_base_and_keys_tell_runs_apart(base, folder):
    run = tuning(base)
    metrics = run.reference.train(folder)["metrics"]
    assert metrics["rerouted"] == 0 and 0 <= metrics["score"] <= 1
    calibrated = ({"calibrate": 2}, {"calibrate": 2, "calibrate_bias": True}, {})
    others = [{"seed": 1}, {"way": "router"}, {"task": "far"}, *({"method": method} for method in calibrated)]
    assert len({run.key, run.reference.key, *(tuning(base, **fields).key for fields in others)}) == 8
    assert tuning(dataclasses.replace(base, material="other text")).key == run.key


def test_tables_of_made_up_runs(base, tmp_path):
    """Differences are paired by base, task, way and seed; forgetting is against the base as it is."""
    base = dataclasses.replace(base, material="")
    entries = ({"label": "none", "method": "none"}, {"label": "φ", "coef": 0.1})
    plan = harness.Plan(
        name="made-up",
        kind="finetune",
        methods=[method for entry in entries for method in harness.expand(entry)],
        axes={"bases": {"small": base}, "tasks": {"near": "near"}, "ways": {"full": "full"}},
        settings={"learning_rates": RATES},
        seeds=[0, 1],
    )
    results = harness.Results(tmp_path / "results.jsonl")
    shared = {"max_vio_global": 0.5, "base_max_vio": 0.25, "domain_information": 0.1, "rerouted": 0.2}
    values = [(3.0, 0.1, 4.0), (2.0, 0.5, 4.5), (1.9, 0.6, 4.25), (2.2, 0.4, 4.4), (2.0, 0.6, 4.3)]
    first = {"first_loss": [3.0, 1.0], "first_max_vio": [2.0], "first_gradient_norm": [1.0]}
    runs = list(plan.runs())
    for run, (loss, score, base_loss) in zip([runs[0].reference, *runs], values):
        metrics = {**shared, "loss": loss, "score": score, "base_loss": base_loss}
        results.add({"key": run.key, "settings": run.settings, "metrics": metrics, "curve": first, "experts": []})
    found = harness.finished(plan, results)
    for mark, row in (
        ("bases", "| small | 3.000 / 10% | 4.000 | 0.25 | 0.100 |"),
        ("full", "| φ | 2 | -0.1500 ± 0.0500 | 2 | +15.0% ± 5.0% | -0.175 ± 0.075 | 0.50 | 0.25 | 20.0% |"),
        ("full; bases", "| φ | -0.150 ± 0.050 / +15.0% ± 5.0% |"),
        ("full; φ against none", "| all | 2 | -0.1500 ± 0.0500 | 2 | -0.175 ± 0.075 | 2 | 1.00 |"),
        ("full; first", "| φ | 2 | 2.000 | "),
    ):
        assert row in tables.make(plan, results, mark, found)
    assert tables.make(plan, results, "full; ψ against none", found) == ""
    without_score = [(shared, shared)]  # MBPP, say
    assert tables.show_mean(without_score, "score", ".1%") == "–"
    assert tables.show_difference(without_score, "score", ".1%") == "–"


def test_families_are_compared_at_the_same_max_vio(base):
    """The curve of a family passes through its runs, is monotone, and follows a parabola better than chords. Runs beyond its ends are left out."""
    entries = ({"label": "none", "method": "none"}, {"label": "φ {coef}", "family": "φ", "coef": [0.1, 0.2]})
    entries += ({"label": "Switch {coef}", "family": "Switch", "method": "switch", "coef": [0.1, 0.2]},)
    plan = harness.Plan(
        name="made-up",
        kind="finetune",
        methods=[method for entry in entries for method in harness.expand(entry)],
        axes={"bases": {"small": base}, "tasks": {"near": "near"}, "ways": {"full": "full"}},
        settings={"learning_rates": RATES},
        seeds=[0, 1],
    )
    points = {"none": (4.0, 1.0), "φ 0.1": (2.0, 1.1), "φ 0.2": (1.0, 1.5), "Switch 0.1": (2.0, 1.25)}
    rows = {label: {0: {"max_vio_global": x, "loss": y}} for label, (x, y) in points.items()}
    rows["Switch 0.2"] = {0: {"max_vio_global": 0.9, "loss": 9.0}}
    rows["none"][1] = {"max_vio_global": 4.0, "loss": 1.0}  # seed 1 is not finished
    found = {("small", "near", "full"): rows}
    table = tables.make(plan, None, "full; loss along φ", found)
    assert table.splitlines()[2:] == ["| Switch | +0.1500, 0 of 1 | +0.1500, 0 of 1 |"]  # 1.25 - 1.1
    rows["Switch 0.1"][0] = {"max_vio_global": 2**0.5, "loss": 1.25}
    (between,) = tables.make(plan, None, "full; loss along φ", found).splitlines()[2:]
    parabola = 1.2625  # through the three points of φ; a chord gives 1.3
    assert float(between.split()[3].rstrip(",")) == pytest.approx(1.25 - parabola, abs=0.02)
    assert tables.make(plan, None, "full; loss along ψ", found) == ""
    assert "| φ 0.2 | 1.500 (+0.500) / 1.00 |" in tables.make(plan, None, "overview", found)


def test_a_limit_prices_only_what_is_over_it(material, base, folder):
    """Its gradient is that of its value, and a run under a limit that no load reaches is a run without balancing."""
    r = torch.tensor([0.0, 1.0, 1.5, 2.0, 4.5], requires_grad=True)
    limit = finetune.Limit("limit", 1.5)
    assert limit.grad(r).tolist() == torch.autograd.grad(limit.phi(r), r)[0].tolist() == [0, 0, 0, 0.5, 3]
    methods = (
        {"method": "none"},
        {"coef": 0.1, "track": "load", "limit": 64.0},
        {"coef": 0.1, "track": "load", "limit": 1.0},
    )
    runs = [tuning(base, method=method) for method in methods]
    none, high, low = (run.train(folder)["metrics"]["loss"] for run in runs)
    assert none == pytest.approx(high, rel=1e-6) and abs(low - none) > 1e-4
    assert len({run.key for run in runs}) == 3


PLANS = """
kind: finetune
base_training: {steps: 2, rows: 2, model_fields: {hidden_size: 32, num_attention_heads: 1, num_key_value_heads: 1}}
defaults: {steps: 2, tokens: 100, seeds: [0], learning_rates: {full: 0.001}}
bases:
  tiny: {model: mixtral, method: {method: none}}
plans:
  one:
    tasks: [near]
    ways: [full]
    portable: true
    methods: [{label: none, method: none}, {label: φ, coef: 0.01}, {label: bias, coef: 0.0, bias_coef: 0.003}]
"""


def test_the_command_trains_bases_then_runs_and_goes_on(material, folder, tmp_path, capsys):
    command, path = load_command(), tmp_path / "plans.yaml"
    path.write_text(PLANS)
    arguments = [str(path), "--output_dir", str(folder)]
    assert command.main([*arguments, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "4 runs, 0 of them finished" in listed and "base tiny" in listed and "tiny near, as it is" in listed
    assert command.main(arguments) == 0
    assert (folder / "one-full.png").is_file() and "| bias | with its bias | " in (folder / "one.md").read_text()
    (plan,) = harness.load_plans(path)[1]
    results = harness.Results(folder / "results.jsonl")
    *others, biased = [results.get(run)["metrics"] for run in plan.runs()]
    assert not any("folded_loss" in figures for figures in others)  # have no bias to do without
    assert biased["folded_loss"] > 0 and 0 <= biased["dropped_score"] <= 1
    assert command.main(arguments) == 0
    assert "4 of them finished" in capsys.readouterr().out
