"""Results folders and cards that are damaged or foreign: refused by the name of the file, or a card is made of them."""

import json
import os

import pytest
import yaml
from hostile import CALM, damaged, json_values
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from hf_phibalance.publishing import Run, model_card
from hf_phibalance.publishing.evaluations import eval_result_files
from hf_phibalance.publishing.licence import base_licence
from hf_phibalance.publishing.pictures import draw
from hf_phibalance.publishing.tables import layer_table, summary_rows


NAMES = ("metrics.json", "history.json", "eval-gsm8k.json")


@pytest.fixture(scope="module")
def good(run_folder):
    return {name: json.loads((run_folder / name).read_text()) for name in NAMES}


@pytest.fixture
def folder(good, tmp_path):
    for name, content in good.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def refused_or_shown(folder, names=NAMES):
    """What is not refused, naming one of the files and a remedy, can be shown everywhere that runs are shown."""
    try:
        run = Run.load(folder)
    except ValueError as error:
        assert any(str(folder / name) in str(error) for name in names), error
        assert any(word in str(error) for word in ("again", "Upgrade", "cannot be used")), error
        return None
    card = model_card(run, title="x")
    assert yaml.safe_load(str(card).split("---")[1])["library_name"] == "transformers"
    assert ModelCard(str(card)).data.library_name == "transformers"
    assert [row[0] for row in summary_rows(run, run)] and isinstance(layer_table(run, run), str)
    eval_result_files(run)
    return run


def changed(values, path, value):
    """`values` with `value` at `path`, or without it."""
    if not path:
        return value
    copied = dict(values) if isinstance(values, dict) else list(values)
    if len(path) == 1 and value is KeyError:
        copied.pop(path[0])
    else:
        copied[path[0]] = changed(copied[path[0]], path[1:], value)
    return copied


@st.composite
def paths_in(draw, values):
    """A place inside JSON values."""
    path = []
    while isinstance(values, dict | list) and values and (not path or draw(st.booleans())):
        keys = sorted(values) if isinstance(values, dict) else range(min(len(values), 2))
        path.append(draw(st.sampled_from(keys)))
        values = values[path[-1]]
    return path


@CALM
@given(data=st.data())
def test_any_field_that_is_something_else(good, folder, data):
    name = data.draw(st.sampled_from(NAMES))
    path = data.draw(paths_in(good[name]))
    value = data.draw(st.one_of(st.just(KeyError), json_values))
    (folder / name).write_text(json.dumps(changed(good[name], path, value)))
    refused_or_shown(folder)
    (folder / name).write_text(json.dumps(good[name]))


@CALM
@given(data=st.data())
def test_any_damage(good, folder, data):
    name = data.draw(st.sampled_from(NAMES))
    (folder / name).write_bytes(data.draw(damaged(json.dumps(good[name]).encode())))
    refused_or_shown(folder)
    (folder / name).write_text(json.dumps(good[name]))


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("metrics.json", ["steps"], "many", "`steps` must be a whole number, got 'many'"),
        ("metrics.json", ["model_type"], KeyError, "`model_type` is missing"),
        ("metrics.json", ["held_out", "max_vio"], "0.1", "`held_out` `max_vio` must be a number"),
        ("metrics.json", ["max_vio"], {"start": 10**400}, "`max_vio` `start` must be a number"),
        ("metrics.json", ["balance"], {"coef": 1, "new": 1, "version": "9.0"}, "`balance`.*'new'.*9.0.*Upgrade"),
        ("metrics.json", [], [], "must hold a JSON object, got list"),
        ("history.json", ["loads", 1, "load"], {}, "`loads` has other layers or experts at one step"),
        ("history.json", ["log_history"], {}, "`log_history` must be a list"),
        ("history.json", ["loads", 0, "step"], None, "`loads` entry 0 `step` must be a whole number"),
        ("history.json", ["weights"], None, r"holds \['weights'\].*Upgrade"),
        ("eval-gsm8k.json", ["metrics"], [0.5], "`metrics` must be an object"),
        ("eval-gsm8k.json", ["metrics", "strict_match"], 10**400, "`strict_match` must be a number"),
        ("eval-gsm8k.json", ["task"], ["gsm8k"], "`task` must be a text"),
    ],
)
def test_what_is_wrong_is_named(good, folder, name, path, value, message):
    content = dict(good[name]) if path == ["weights"] else good[name]
    if path == ["weights"]:
        content["weights"] = []
    (folder / name).write_text(json.dumps(changed(content, path, value)))
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        Run.load(folder)


def test_a_good_folder_is_shown_and_drawn(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("drawn")
    run = refused_or_shown(folder)
    draw(target, run, run, dpi=20)
    assert len(run.evaluations) == 1 and {path.name for path in target.iterdir()} == {"loads.png", "curves.png"}


def test_a_name_inside_a_file_leads_nowhere(good, folder):
    """The name of a result on the Hub comes from that of its file, not from what the file says."""
    (folder / "eval-gsm8k.json").write_text(json.dumps({**good["eval-gsm8k.json"], "file": "../../../eval-x.json"}))
    assert list(eval_result_files(Run.load(folder))) == ["gsm8k.yaml"]


def test_links_and_pipes(folder):
    path = folder / "metrics.json"
    path.rename(folder / "elsewhere")
    path.symlink_to("elsewhere")
    assert refused_or_shown(folder) is not None
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match=r"lacks metrics\.json"):
        Run.load(folder)
    (folder / "eval-pipe.json").symlink_to("metrics.json")
    path.with_name("elsewhere").rename(folder / "m")
    path.unlink()
    (folder / "m").rename(path)
    os.mkfifo(folder / "pipe")
    (folder / "eval-pipe.json").unlink()
    (folder / "eval-pipe.json").symlink_to("pipe")
    with pytest.raises(ValueError, match=r"eval-pipe\.json is no file"):
        Run.load(folder)


# ---------------------------------------------------------------------- the card of a base model


CARD = b"---\nlicense: other\nlicense_name: terms\ntags:\n- a\n---\n# Base\n"


@CALM
@given(data=st.data())
def test_any_damage_to_the_card_of_a_base_model(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "README.md").write_bytes(data.draw(damaged(CARD)))
    licence = base_licence(str(folder))
    assert licence.keys() <= {"license", "license_name", "license_link"}
    assert all(isinstance(value, str) for value in licence.values())


@pytest.mark.parametrize(
    "content",
    [
        b"---\nlicense: \xff\n---\n",
        b"---\nlicense: [\n---\n",
        b"---\n- license\n---\n",
        b"---\n" + b"[" * 2000 + b"\n---\n",
        b"---\n1: 2\nlicense: {}\n---\n",
        b"---\nlicense: !!python/object/apply:os.makedirs ['%s']\n---\n",
        b"---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nlicense: *c\n---\n",
    ],
    ids=["latin-1", "cut off", "a list", "deep", "numbers", "python", "aliases"],
)
def test_a_card_that_is_no_card(content, tmp_path):
    marker = tmp_path / "it was run"
    (tmp_path / "README.md").write_bytes(content.replace(b"%s", str(marker).encode()))
    assert base_licence(str(tmp_path)) == {}
    assert not marker.exists()
