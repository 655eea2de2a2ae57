"""Results, texts and plans of the comparison that are damaged or foreign: left out or refused, and nothing is run."""

import json
import pickle
import warnings

import pytest
import torch
from comparison import small_run
from hostile import CALM, Bomb, damaged, json_values
from hypothesis import example, given
from hypothesis import strategies as st


def record_of(run, **changes):
    return {"key": run.key, "settings": run.settings, "metrics": {"loss": 1.0}, "curve": {}, "experts": [], **changes}


def read(house, path, lines):
    """The results, and how many lines were warned about."""
    path.write_bytes(b"\n".join(lines) + b"\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return house["records"].Results(path), len(caught)


@CALM
@given(data=st.data())
def test_a_damaged_line_harms_no_other(house, data, tmp_path_factory):
    runs = [small_run(house, seed=seed) for seed in range(3)]
    lines = [json.dumps(record_of(run)).encode() for run in runs]
    lines[1] = data.draw(damaged(lines[1])).replace(b"\n", b" ")
    results, _ = read(house, tmp_path_factory.getbasetemp() / "results.jsonl", lines)
    assert runs[0] in results and runs[2] in results
    for run in runs:
        found = results.get(run)
        assert found is None or all(isinstance(value, float | int) for value in found["metrics"].values())


@CALM
@given(
    line=st.one_of(
        json_values.map(json.dumps),
        st.fixed_dictionaries({"settings": json_values, "metrics": json_values}).map(json.dumps),
        st.binary(max_size=40).map(lambda content: content.replace(b"\n", b"").decode("latin-1")),
    )
)
@example(line="[" * 500_000)
@example(line='{"settings": {"corpus": "x", "corpus": "y"}, "metrics": {}}')
@example(line='{"settings": {"corpus": "x"}, "metrics": {"loss": "1.0"}}')
@example(line='{"settings": {"corpus": "x"}, "metrics": {"loss": ' + "1" * 5000 + "}}")
def test_a_line_of_anything(house, line, tmp_path_factory):
    run = small_run(house)
    lines = [json.dumps(record_of(run)).encode(), line.encode("latin-1", errors="replace")]
    results, warned = read(house, tmp_path_factory.getbasetemp() / "results.jsonl", lines)
    assert results.get(run)["metrics"] == {"loss": 1.0}
    assert len(results) + warned == (2 if line.strip() else 1)


def test_a_result_of_a_later_version_is_another_run(house, tmp_path):
    """Settings that this version does not know are part of what a result depends on: it is kept, and not mistaken."""
    run = small_run(house)
    later = record_of(run, settings={**run.settings, "new_setting": 1})
    results, warned = read(house, tmp_path / "results.jsonl", [json.dumps(later).encode()])
    assert run not in results and len(results) == 1 and not warned


@pytest.mark.parametrize("disguise", ["pickle", "torch.save", "damaged", "foreign"])
def test_a_text_that_cannot_be_read(house, corpus, disguise, tmp_path):
    marker, path = tmp_path / "it was run", tmp_path / "corpus-x.pt"
    if disguise == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    elif disguise == "torch.save":
        torch.save({"train": Bomb(marker)}, path)
    elif disguise == "foreign":
        torch.save({"something": torch.zeros(3)}, path)
    else:
        torch.save(vars(corpus), path)
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"corpus-x\.pt cannot be read.*remove it, and it is made again"):
        house["corpus"].load_corpus("x", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside", "a/b", "/absolute", "..", ""])
def test_a_plan_whose_name_leaves_the_folder(house, name, tmp_path):
    """It names a file of tables and pictures."""
    (tmp_path / "plans.yaml").write_text(
        json.dumps({"plans": {name: {"methods": [{"label": "none", "method": "none"}]}}})
    )
    with pytest.raises(ValueError, match=r"plans\.yaml: the plan .* cannot name a file"):
        house["plans"].load_plans(tmp_path / "plans.yaml")


def test_plans_are_plain_data(house, tmp_path):
    marker = tmp_path / "it was run"
    (tmp_path / "plans.yaml").write_text(f"plans: !!python/object/apply:os.makedirs ['{marker}']")
    with pytest.raises(Exception, match="python/object"):
        house["plans"].load_plans(tmp_path / "plans.yaml")
    assert not marker.exists()
