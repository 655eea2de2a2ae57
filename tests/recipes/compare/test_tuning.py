"""The comparison in fine-tuning: made exercises, what learns, the loop against one without this package, grading, tables."""

import dataclasses

import pytest
import torch

import hf_phibalance as phb


SMALL = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
RATES = {"full": 0.001, "LoRA": 0.003, "LoRA, router by LoRA": 0.003, "LoRA, router full": 0.003, "router": 0.003}


@pytest.fixture(scope="module")
def material(house, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    text = [f"the river {n} and the town {n * 7} " * 40 for n in range(140)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(house["finetuning.material"], "read_documents", lambda source: {"prose": text, "problems": text})
        patch.setattr(house["finetuning.material"], "HELD_OUT_WINDOWS", 8)
        patch.setattr(house["finetuning.exercises"], "HELD_OUT", 8)
        return house["finetuning.material"].build_material("built-in", 400, folder), folder


@pytest.fixture(scope="module")
def base(house, material):
    built, folder = material
    base = house["finetuning.run"].Base(
        name="small", model="mixtral", method={"method": "none"}, model_fields=SMALL, steps=4, rows=2
    )
    base = dataclasses.replace(base, material=built.fingerprint)
    house["finetuning.bases"].train_base(base, built, folder)
    return base


def tuning(house, base, **fields):
    default = {"task": "near", "way": "full", "seed": 0, "method": {"method": "none"}, "steps": 3, "tokens": 200}
    return house["finetuning.run"].Tuning(base=base, learning_rates=RATES, **{**default, **fields})


def test_made_functions_pass_their_checks_and_no_split_shares_one(house):
    grading, task = house["finetuning.grading"], house["finetuning.exercises"].functions(None)
    for exercise in task.held_out[:3]:
        assert grading.is_function(exercise.prompt, exercise.completion + "\nprint(1)", exercise.reference)
        assert not grading.is_function(exercise.prompt, "    return None\n", exercise.reference)
        assert not grading.is_function(exercise.prompt, "    return (\n", exercise.reference)
    parts = [{e.prompt for e in part} for part in (task.train, task.held_out, task.base)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(task.train) + len(task.held_out) + len(task.base)


@pytest.mark.parametrize("name", ["near", "far"])
def test_made_problems_are_scored_by_their_answer_and_held_out(house, name):
    grading, task = house["finetuning.grading"], getattr(house["finetuning.exercises"], name)(None)
    parts = [{e.prompt for e in part} for part in (task.train, task.held_out, task.base)]
    assert not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    exercise = task.held_out[0]
    assert grading.is_answer(exercise.prompt, exercise.completion + "\n\nQuestion: #### 1", exercise.reference)
    assert not grading.is_answer(exercise.prompt, " #### 1000", exercise.reference)


def test_only_completions_are_learnt_and_padding_is_marked(house):
    batch = house["finetuning.material"].collate([([5, 6, 7, 8], 2), ([9, 10], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 10, -100, -100]]


def test_the_loop_is_plain_fine_tuning(house, material, base):
    """Without balancing, the same as a loop of torch alone."""
    built, folder = material
    record = house["finetuning.tuning"].tune(tuning(house, base, micro_batches=2), built, folder)
    model = house["finetuning.bases"].load_base(base, built, folder)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors}], lr=0.001, betas=(0.9, 0.95), weight_decay=0
    )
    task = built.tasks["near"]
    rows = house["finetuning.tuning"].rows_of(task, 200)
    for step, exercises in zip(range(3), house["finetuning.tuning"].batches(task, rows, 0)):
        batch = house["finetuning.material"].collate(exercises)
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * house["loop"].lr_factor(step, 3)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses, count = 0.0, 0
    for batch in house["finetuning.tuning"].held_out_batches(task):
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:].flatten()
        losses += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").detach())
        count += int((labels != -100).sum())
    assert record["metrics"]["loss"] == pytest.approx(losses / count, rel=2e-4)
    assert len(record["curve"]["first_gradient_norm"]) == 3


@pytest.mark.parametrize("way", RATES)
def test_each_way_trains_what_it_says(house, material, base, way):
    model = house["finetuning.bases"].load_base(base, material[0], material[1])
    phb.patch(model, phb.PhiBalanceConfig())
    names = {n for n, p in house["finetuning.ways"].prepare(model, way, 4, 0).named_parameters() if p.requires_grad}
    routers = {name for name in names if ".gate." in name}
    adapters = {name for name in names if "lora_" in name}
    assert bool(routers) == (way not in ("LoRA",))
    assert bool(adapters) == way.startswith("LoRA")
    assert (names == routers) == (way == "router")
    assert bool(routers & adapters) == (way == "LoRA, router by LoRA")


def test_a_run_without_steps_is_the_base_and_keys_tell_runs_apart(house, material, base):
    built, folder = material
    record = house["finetuning.tuning"].tune(tuning(house, base, steps=0), built, folder)
    assert record["metrics"]["rerouted"] == 0 and 0 <= record["metrics"]["score"] <= 1
    keys = {
        tuning(house, base, **fields).key
        for fields in (
            {},
            {"seed": 1},
            {"way": "router"},
            {"task": "far"},
            {"method": {"calibrate": 2}},
            {"method": {"calibrate": 2, "calibrate_bias": True}},
            {"method": {}},
        )
    }
    assert len(keys) == 7
    assert tuning(house, dataclasses.replace(base, material="other text")).key == tuning(house, base).key


def test_tables_of_made_up_tuning(house, base, tmp_path):
    """Differences are paired by base, task, way and seed; forgetting is against the base as it was."""
    plans, tables = house["finetuning.plans"], house["finetuning.tables"]
    methods = [
        m for e in ({"label": "none", "method": "none"}, {"label": "φ", "coef": 0.1}) for m in house["plans"].expand(e)
    ]
    plan = plans.Plan(
        name="made-up",
        methods=methods,
        bases=[base],
        tasks=["near"],
        ways=["full"],
        learning_rates=RATES,
        seeds=[0, 1],
    )
    results = house["records"].Results(tmp_path / "results.jsonl")
    shared = {"max_vio_global": 0.5, "base_max_vio": 0.25, "domain_information": 0.1, "rerouted": 0.2}
    shared |= {"max_vio_train_batch": 1.0}
    values = [(3.0, 0.1, 4.0), (2.0, 0.5, 4.5), (1.9, 0.6, 4.25), (2.2, 0.4, 4.4), (2.0, 0.6, 4.3)]
    first = {"first_loss": [3.0, 1.0], "first_max_vio": [2.0], "first_gradient_norm": [1.0]}
    for run, (loss, score, base_loss) in zip(plan.runs(), values):
        metrics = {**shared, "loss": loss, "score": score, "base_loss": base_loss}
        results.add({"key": run.key, "settings": run.settings, "metrics": metrics, "curve": first, "experts": []})
    (path,) = tables.write_tables(plan, results, tmp_path)
    text = path.read_text()
    assert "| small | 3.000 / 10% | 4.000 | 0.25 | 0.100 |" in text
    assert "| φ | 2 | -0.1500 ± 0.0500 | 2 | +15.0% ± 5.0% | -0.175 ± 0.075 | 0.50 | 0.25 | 20.0% |" in text
    without_score = [(shared, shared)]  # MBPP, say
    assert tables._mean(without_score, "score", ".1%") == tables._difference(without_score, "score", ".1%") == "–"
    for mark, row in (
        ("full", "| φ | 2 | -0.1500"),
        ("full; bases", "| φ | -0.150 ± 0.050 / +15.0% ± 5.0% |"),
        ("full; φ against none", "| all | 2 | -0.1500 ± 0.0500 | 2 | -0.175 ± 0.075 | 2 | 1.00 |"),
        ("full; first", "| φ | 2 | 2.000 | "),
    ):
        marked = f"<!-- table: made-up; {mark} -->\nold\n<!-- /table -->"
        assert row in tables.refresh(marked, [plan], results)
    with pytest.raises(ValueError, match="no finished runs of 'ψ' beside those of 'none'"):
        tables.refresh("<!-- table: made-up; full; ψ against none -->\n<!-- /table -->", [plan], results)
    with pytest.raises(ValueError, match="nothing"):
        tables.refresh("<!-- table: nothing; full -->\n<!-- /table -->", [plan], results)


def test_the_command_trains_bases_then_runs_and_goes_on(house, material, tmp_path, monkeypatch, capsys):
    built, folder = material
    monkeypatch.setattr(house["finetuning.command"], "build_material", lambda *args: built)  # it lies in the folder
    (tmp_path / "plans.yaml").write_text(PLANS)
    command = [str(tmp_path / "plans.yaml"), "--output_dir", str(folder)]
    assert house["command"].main([*command, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "base tiny" in listed and "tiny near, as it is" in listed
    assert house["command"].main(command) == 0
    said = capsys.readouterr().out
    assert (
        "4 runs, 0 of them finished" in said and (folder / "one.md").is_file() and (folder / "one-full.png").is_file()
    )
    records = house["records"].Results(folder / "results.jsonl")
    (plan,) = house["finetuning.plans"].load_plans(tmp_path / "plans.yaml")[1]
    assert all(records.get(run)["metrics"]["loss"] > 0 for run in plan.runs())
    *others, biased = [records.get(run)["metrics"] for run in plan.runs()]
    assert not any("folded_loss" in figures for figures in others)  # have no bias to do without
    assert biased["folded_loss"] > 0 and 0 <= biased["dropped_score"] <= 1
    assert "| bias | with its bias | " in (folder / "one.md").read_text()
    assert house["command"].main(command) == 0
    assert "4 of them finished" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"--streams: the plans of .* have no streams, but models, tasks, ways, seeds"
    ):
        house["command"].main([*command, "--streams", "mixed"])


PLANS = """
base_training: {steps: 2, rows: 2, model_fields: {hidden_size: 32, num_attention_heads: 1, num_key_value_heads: 1}}
training: {steps: 2, tokens: 100, seeds: [0], learning_rates: {full: 0.001}}
bases:
  tiny: {model: mixtral, method: {method: none}}
plans:
  one:
    tasks: [near]
    ways: [full]
    portable: true
    methods: [{label: none, method: none}, {label: φ, coef: 0.01}, {label: bias, coef: 0.0, bias_coef: 0.003}]
"""
