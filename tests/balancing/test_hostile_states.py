"""State files and adapter folders that are damaged at random, foreign, or meant to do harm: refused, and nothing is run."""

import json
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from checks import assert_same, is_patched
from hostile import CALM, Bomb, damaged, json_values
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.balancing import config_in
from hf_phibalance.balancing.state import LARGEST, checksum
from hf_phibalance.files import STATE_NAME, replacing


BOTH = {"coef": 0.5, "bias_coef": 0.2}
NAME = "layers.1.mlp.gate"


@pytest.fixture(scope="module")
def model():
    model = phb.patch(tiny_model("mixtral", num_hidden_layers=2).train(), BOTH)
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Path, bytes, tensors and header of a good file."""
    path = phb.get_balancer(model).save(tmp_path_factory.mktemp("state"))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the file's own pages
    return path, path.read_bytes(), tensors, header


def refused_or_the_same(model, path):
    """What is not refused, naming the file and a remedy, is what was written; the model is as before."""
    balancer = phb.get_balancer(model)
    before = {**balancer.state_dict(), **{f"weight/{name}": p.clone() for name, p in model.named_parameters()}}
    try:
        balancer.load(path)
    except (ValueError, OSError) as error:
        text = str(error)
        assert type(error) in (ValueError, FileNotFoundError), error
        assert any(word in text for word in ("Load the state", "delete it", "Use ", "use an", "saved while patched"))
    assert_same({**balancer.state_dict(), **{f"weight/{n}": p for n, p in model.named_parameters()}}, before)


@CALM
@given(data=st.data())
def test_any_damage(model, written, data):
    path, content, _, _ = written
    path.write_bytes(data.draw(damaged(content)))
    refused_or_the_same(model, path)


TENSORS = st.builds(
    lambda dtype, shape, value: torch.full(shape, value).to(dtype),
    st.sampled_from(
        [torch.float32, torch.float64, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64]
    ),
    st.sampled_from([(), (0,), (1,), (7,), (8,), (9,), (8, 1), (2, 4)]),
    st.sampled_from([0.0, 0.125, 1.0, -1.0, float("nan"), float("inf"), 3e38]),
)


@CALM
@given(
    changes=st.dictionaries(
        st.one_of(
            st.sampled_from(["steps", f"{NAME}.bias", f"{NAME}.mean_probs", f"{NAME}.mean_load"]),
            st.sampled_from(["", ".bias", "x.bias", f"{NAME}.", f"{NAME}.mean_", "../../x.bias", f"{NAME}.variance"]),
        ),
        st.one_of(st.none(), TENSORS),
        min_size=1,
        max_size=3,
    )
)
@example(changes={f"{NAME}.mean_load": torch.full((8,), 0.125, dtype=torch.float16)})
def test_signed_files_of_other_content(model, written, changes, tmp_path_factory):
    """Whole files with a right checksum: tensors of other types, shapes and values, more of them, or fewer."""
    _, _, tensors, header = written
    state = {**tensors, **changes}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    path = tmp_path_factory.mktemp("signed") / STATE_NAME
    save_file(state, path, metadata={**header, "checksum": checksum(state, header)})
    balancer = phb.get_balancer(model)
    before = balancer.state_dict()
    try:
        balancer.load(path)
    except ValueError:
        assert_same(balancer.state_dict(), before)
        return
    for name, value in changes.items():  # what a training may have left
        if value is None:
            assert name == "steps" or name not in tensors
        elif name == "steps":
            assert balancer.steps == int(value) >= 0 and value.dtype == torch.int64
        else:
            assert (
                value.shape == (8,) and torch.isfinite(value).all() and value.dtype in (torch.float32, torch.float64)
            )
            assert name.endswith("bias") or torch.allclose(value, torch.full_like(value, 0.125))
    balancer.load_state_dict(before)
    assert_same(balancer.state_dict(), before)


@CALM
@given(
    headers=st.dictionaries(
        st.sampled_from(["model", "config", "phi_balance", "version", "format", "note"]),
        st.one_of(st.none(), st.text(max_size=20), json_values.map(json.dumps)),
        min_size=1,
        max_size=3,
    ),
)
@example(headers={"model": "[" * 100_000})
@example(headers={"model": '{"type": "mixtral", "routers": {"layers.0.mlp.gate": []}}'})
@example(headers={"config": "[" * 100_000})
def test_signed_headers_of_other_content(model, written, headers, tmp_path_factory):
    _, _, tensors, header = written
    changed = {
        name: value for name, value in {**header, **headers}.items() if value is not None and name != "checksum"
    }
    changed["checksum"] = checksum(tensors, changed)
    path = tmp_path_factory.mktemp("headers") / STATE_NAME
    save_file(tensors, path, metadata=changed)
    refused_or_the_same(model, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.update(phi_balance="9" * 10**6, version="v" * 10**6),
        lambda header, tensors: header.update({"n" * 10**6: "", **{f"n{i}": "" for i in range(999)}}),
        lambda header, tensors: header.update(model=header["model"].replace("mixtral", "m" * 10**6)),
        lambda header, tensors: header.update(model=header["model"].replace("layers.1", "l" * 10**6)),
        lambda header, tensors: header.update(model=header["model"].replace("[8", "[" + json.dumps("8" * 10**6))),
        lambda header, tensors: header.update(model='{"' + "k" * 10**6 + '":1,"' + "k" * 10**6 + '":1}'),
        lambda header, tensors: tensors.update({"k" * 10**6: torch.zeros(1)}),
        lambda header, tensors: tensors.update(steps=torch.arange(10**5)),
    ],
    ids=["version", "header", "type", "router", "experts", "twice", "tensor", "steps"],
)
def test_refusals_do_not_quote_a_whole_file(model, written, change, tmp_path):
    header, tensors = dict(written[3]), dict(written[2])
    change(header, tensors)
    header["checksum"] = checksum(tensors, header)
    save_file(tensors, tmp_path / STATE_NAME, metadata=header)
    with pytest.raises(ValueError, match=r"delete it|fresh duals|Load the state|earlier checkpoint") as error:
        phb.get_balancer(model).load(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_state_of_100_000_routers_is_refused_at_once(model, written, tmp_path):
    header = dict(written[3])
    described = json.loads(header["model"])
    described["routers"] = {f"{i}.layers.0.mlp.gate": [8, 2, "softmax"] for i in range(100_000)}
    header["model"] = json.dumps(described)
    header["checksum"] = checksum(written[2], header)
    save_file(written[2], tmp_path / STATE_NAME, metadata=header)
    start = time.monotonic()
    with pytest.raises(ValueError, match="belongs to another model"):
        phb.get_balancer(model).load(tmp_path)
    assert time.monotonic() - start < 10


def header_promising(size, shape):
    text = json.dumps({f"{NAME}.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("is_kept", [False, True], ids=["promised", "sparse"])
def test_ten_gigabytes(model, tmp_path, is_kept):
    """Promised by a header, or there, in a file without blocks on the disk: neither is allocated."""
    path, size = tmp_path / STATE_NAME, 10 * 2**30
    path.write_bytes(header_promising(size, [size // 4]))
    if is_kept:
        os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    refused_or_the_same(model, path)
    with pytest.raises(ValueError, match="damaged"):
        config_in(path)
    assert tracemalloc.get_traced_memory()[1] < LARGEST / 10
    tracemalloc.stop()


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 2**27, 0])
def test_lengths_of_a_header(model, tmp_path, length):
    (tmp_path / STATE_NAME).write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    refused_or_the_same(model, tmp_path)


@pytest.mark.parametrize("disguise", ["pickle", "torch.save"])
def test_a_pickle_in_disguise_is_not_run(model, disguise, tmp_path):
    marker = tmp_path / "it was run"
    path, bomb = tmp_path / STATE_NAME, Bomb(marker)
    path.write_bytes(pickle.dumps(bomb)) if disguise == "pickle" else torch.save({"steps": bomb}, path)
    refused_or_the_same(model, path)
    with pytest.raises(ValueError, match="damaged"):
        config_in(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists()  # it would have been seen


def test_links_and_pipes(model, written, tmp_path):
    """A link is followed, as the cache of the Hub has them; one in a circle, to nowhere, or to what has no end is refused."""
    content, path = written[1], tmp_path / STATE_NAME
    (tmp_path / "elsewhere").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere")
    refused_or_the_same(model, path)
    phb.get_balancer(model).save(tmp_path)  # into the folder, not through the link
    assert not path.is_symlink() and (tmp_path / "elsewhere").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    for target in (path, "nowhere", "pipe", "/dev/zero"):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(FileNotFoundError, match="saved while patched"):
            phb.get_balancer(model).load(path)


def test_saving_does_not_write_through_a_link_in_the_way(model, tmp_path):
    """A folder from somewhere else may hold a link by the name of what is written first."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / Path(STATE_NAME).with_suffix(".partial")).symlink_to(tmp_path / "precious")
    phb.get_balancer(model).save(tmp_path)
    (tmp_path / "any.partial").symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "any.json") as partial:
        partial.write_text("{}")
    assert (tmp_path / "precious").read_text() == "precious"
    phb.get_balancer(model).load(tmp_path)


# ---------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with the adapter of a patched model, and its base beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder / "base")
    base = phb.AutoModelForCausalLM.from_pretrained(folder / "base", phi_balance=BOTH)
    config = LoraConfig(target_modules=["o_proj"], r=2, task_type="CAUSAL_LM")
    phb.patch(get_peft_model(base, config)).save_pretrained(folder / "adapter")
    try:
        phb.AutoModelForCausalLM.from_pretrained(folder / "adapter")
    except ImportError as error:  # transformers 5.6 asks for more than PEFT 0.18 has
        pytest.skip(f"this transformers cannot load an adapter with this PEFT: {error}")
    return folder / "adapter"


@CALM
@given(data=st.data())
def test_any_damage_to_the_state_of_an_adapter(adapter, data):
    good = (adapter / STATE_NAME).read_bytes()
    (adapter / STATE_NAME).write_bytes(data.draw(damaged(good, smallest=1)))
    try:
        loaded = phb.AutoModelForCausalLM.from_pretrained(adapter)
    except ValueError as error:
        assert STATE_NAME in str(error) or "φ-balance state" in str(error)
    else:
        assert phb.get_balancer(loaded).config == phb.PhiBalanceConfig(**BOTH)
    finally:
        (adapter / STATE_NAME).write_bytes(good)


def test_weights_of_an_adapter_that_are_a_pickle(adapter, tmp_path):
    marker, folder = tmp_path / "it was run", tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", STATE_NAME):
        (folder / name).write_bytes((adapter / name).read_bytes())
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save({"weight": Bomb(marker)}, folder / name)
        with pytest.raises(Exception):  # noqa: B017, whatever the library that reads it says
            phb.AutoModelForCausalLM.from_pretrained(folder)
        assert not marker.exists()


# ---------------------------------------------------------------------- configurations beside a model


@CALM
@given(value=json_values)
@example(value=False)
@example(value=[])
@example(value=0)
@example(value="")
@example(value={})
@example(value="x" * 1_000_000)
@example(value={"x" * 1_000_000: 1, "version": "v" * 1_000_000})
@example(value=json.loads("[" * 100 + "]" * 100))
@example(value={"coef": float("nan")})
@example(value={"coef": 0.1, "from_the_future": 1, "version": "99.0"})
def test_what_a_config_json_says(model, value, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "configured"
    if not folder.is_dir():
        tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "phi_balance": value}))
    try:
        loaded = phb.AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert f"`phi_balance` in {folder}/config.json" in str(error) and "phi_balance=False" in str(error)
        assert len(str(error)) < 1500
        assert not is_patched(phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=False))
    else:
        config = phb.PhiBalanceConfig.from_any(value)
        assert phb.get_balancer(loaded).config == config if config else not is_patched(loaded)
        assert config is not None or value is None or value is False
    explicit = phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=BOTH)
    assert phb.get_balancer(explicit).config == phb.PhiBalanceConfig(**BOTH)


def test_a_good_file_in_bytes(written):
    """What the above damages is what `save` writes, and not refused for another reason."""
    path, _, tensors, header = written
    path.write_bytes(save(tensors, metadata=header))
    assert header["checksum"] == checksum(load_file(path), header)
