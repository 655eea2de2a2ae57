"""State files that are damaged, foreign or meant to do harm: refused with a remedy, the model untouched, nothing run."""

import json
import os
import pickle
import random
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
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model
from trained import BIAS, duals, trained

import hf_phibalance as phb
from hf_phibalance.balancing import read_state
from hf_phibalance.balancing.state import LARGEST, checksum
from hf_phibalance.files import STATE_NAME, replacing


NAME = "layers.1.mlp.gate"
LONG = 10**6  # characters of a foreign value, which a message must not quote whole


@pytest.fixture(scope="module")
def model():
    model = phb.patch(tiny_model("mixtral", num_hidden_layers=2).train(), BIAS)
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    """Bytes, tensors and header of a good file."""
    path = phb.get_balancer(model).save(tmp_path_factory.mktemp("state"))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["checksum"] == checksum(load_file(path), header)  # so that no refusal is for a wrong way of signing
    return path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}, header


def everything(model):
    """The duals and weights of `model`."""
    return {**phb.get_balancer(model).state_dict(), **{f"weight/{n}": p.clone() for n, p in model.named_parameters()}}


def refused(model, path, remedy="Load the state|delete it|Use |use an|saved while patched|another model|fresh duals"):
    """Asserts that `path` is refused with `remedy` in a short message, and that the model is as before."""
    before = everything(model)
    with pytest.raises((ValueError, FileNotFoundError), match=remedy) as error:
        phb.get_balancer(model).load(path)
    assert len(str(error.value)) < 1000
    assert_same(everything(model), before)


def write(folder, tensors, header, sign=True):
    """Writes a state file; with `sign`, its checksum is right."""
    if sign:
        header = {**header, "checksum": checksum(tensors, header)}
    save_file(tensors, folder / STATE_NAME, metadata=header)
    return folder / STATE_NAME


# ---------------------------------------------------------------------- damage


@pytest.mark.slow
@CALM
@given(data=st.data())
def test_any_damage(model, good, data, tmp_path_factory):
    """A damaged file is refused, or it is what was written."""
    path, before = tmp_path_factory.getbasetemp() / "damaged.state", everything(model)
    path.write_bytes(data.draw(damaged(good[0])))
    try:
        phb.get_balancer(model).load(path)
    except (ValueError, FileNotFoundError) as error:
        assert any(word in str(error) for word in ("Load the state", "delete it", "Use ", "use an", "saved while"))
    assert_same(everything(model), before)


@pytest.mark.slow
def test_one_flipped_bit_is_always_seen(model, good, tmp_path):
    """300 random bits of the file, one at a time."""
    before, path = everything(model), tmp_path / STATE_NAME
    for bit in random.Random(0).sample(range(8 * len(good[0])), 300):
        content = bytearray(good[0])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|not written by|written by hf_phibalance|another model"):
            phb.get_balancer(model).load(path)
    assert_same(everything(model), before)


def header_promising(size):
    text = json.dumps({f"{NAME}.bias": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(text)) + text


BYTES = {
    "garbage": b"not a sidecar",
    "zeros": b"\0" * 64,
    **{f"header of {n}": struct.pack("<Q", n) + b"{}" * 50 for n in (2**63 - 1, 2**64 - 1, 2**27, 0)},
    "promises 10 GB": header_promising(10 * 2**30),
}


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("sparse", [False, True])
def test_files_that_are_no_state(model, content, sparse, tmp_path):
    """Neither promised bytes nor those of a file without blocks on the disk are allocated."""
    path = tmp_path / STATE_NAME
    path.write_bytes(content)
    if sparse:
        os.truncate(path, path.stat().st_size + 10 * 2**30)
    tracemalloc.start()
    refused(model, path, "damaged|Load the state|delete it")
    with pytest.raises(ValueError, match="damaged"):
        read_state(path)
    assert tracemalloc.get_traced_memory()[1] < LARGEST / 10
    tracemalloc.stop()


@pytest.mark.parametrize("disguise", ["pickle", "torch.save"])
def test_a_pickle_in_disguise_is_not_run(model, disguise, tmp_path):
    path, bomb = tmp_path / STATE_NAME, Bomb(tmp_path / "it was run")
    path.write_bytes(pickle.dumps(bomb)) if disguise == "pickle" else torch.save({"steps": bomb}, path)
    refused(model, path, "damaged")
    with pytest.raises(ValueError, match="damaged"):
        read_state(path)
    assert not (tmp_path / "it was run").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "it was run").exists()  # it would have been seen


def test_links_and_pipes(model, good, tmp_path):
    """A link is followed, as the cache of the Hub has them; one in a circle, to nowhere, or to what has no end is refused."""
    path, elsewhere = tmp_path / STATE_NAME, tmp_path / "elsewhere"
    elsewhere.write_bytes(good[0])
    path.symlink_to(elsewhere)
    phb.get_balancer(model).load(path)
    phb.get_balancer(model).save(tmp_path)  # into the folder, not through the link
    assert not path.is_symlink() and elsewhere.read_bytes() == good[0]
    os.mkfifo(tmp_path / "pipe")
    for target in (path, "nowhere", "pipe", "/dev/zero"):
        path.unlink()
        path.symlink_to(target)
        refused(model, path, "saved while patched")


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


# ---------------------------------------------------------------------- whole files of other content


def setting(name, value):
    """Changes tensor `name` to `value`, or by it if it is a function; None removes it."""

    def change(tensors, header):
        tensors[name] = value(tensors[name]) if callable(value) else value
        if value is None:
            del tensors[name]

    return change


def heading(**values):
    return lambda tensors, header: header.update(
        {name: v(header[name]) if callable(v) else v for name, v in values.items()}
    )


def halved(tensors, header):
    tensors.update({name: value.bfloat16() for name, value in tensors.items() if name != "steps"})


PROBS, LOAD, BIAS_OF = (f"{NAME}.{kind}" for kind in ("mean_probs", "mean_load", "bias"))
SIGNED = {  # what changes in a rightly signed file, and what the refusal says
    "nan": (setting(PROBS, lambda t: t / 0), "mean_probs.*not finite.*earlier checkpoint"),
    "infinite bias": (setting(BIAS_OF, torch.full((8,), torch.inf)), "bias.*not finite.*earlier checkpoint"),
    "no load": (setting(LOAD, None), "no .*mean_load.*fresh duals"),
    "no bias": (setting(BIAS_OF, None), "no .*bias.*fresh duals"),
    "another layer": (setting("extra.mean_load", torch.ones(8)), "'extra.mean_load'.*another model"),
    "another tensor": (setting(f"{NAME}.variance", torch.ones(8)), "variance"),
    "times 7": (setting(LOAD, lambda t: 7 * t), "mean_load.*no distribution.*sum to 7"),
    "negated": (setting(PROBS, torch.neg), "mean_probs.*no distribution"),
    "negative steps": (setting("steps", torch.tensor(-1)), "steps.*whole number"),
    "float steps": (setting("steps", torch.tensor(2.0)), "steps.*whole number"),
    "many steps": (setting("steps", torch.arange(10**5)), "steps.*whole number"),
    "int32": (setting(BIAS_OF, lambda t: t.to(torch.int32)), "int32.*float32"),
    "fp16": (setting(LOAD, torch.Tensor.half), "float16.*float32"),
    "bf16": (halved, "bfloat16.*float32"),
    "a long tensor name": (setting("k" * LONG, torch.zeros(1)), "another model"),
    "no header": (lambda tensors, header: header.clear(), "not written by hf_phibalance"),
    "future": (heading(phi_balance="2", version="99.0"), "phibalance '99.0' in format '2'.*reads format '1'"),
    "long version": (heading(phi_balance="9" * LONG, version="v" * LONG), "reads format '1'"),
    "long header": (heading(**{"n" * LONG: "", **{f"n{i}": "" for i in range(999)}}), "damaged"),
    "long type": (heading(model=lambda m: m.replace("mixtral", "m" * LONG)), "another model|delete it"),
    "long router": (heading(model=lambda m: m.replace("layers.1", "l" * LONG)), "another model|delete it"),
    "long number": (heading(model=lambda m: m.replace("[8", f'["{"8" * LONG}"')), "delete it|another model"),
    "key twice": (heading(model=f'{{"{"k" * LONG}":1,"{"k" * LONG}":1}}'), "delete it|another model"),
}


@pytest.mark.parametrize(("change", "remedy"), SIGNED.values(), ids=SIGNED)
def test_signed_files_that_no_training_has_left(model, good, change, remedy, tmp_path):
    tensors, header = dict(good[1]), dict(good[2])
    change(tensors, header)
    refused(model, write(tmp_path, tensors, header, sign=bool(header)), remedy)


@pytest.mark.parametrize(
    "change",
    [heading(checksum="0"), heading(note="x"), heading(config=json.dumps({"coef": 0.25}))],
    ids=["checksum", "note", "config"],
)
def test_the_header_is_under_the_checksum(model, good, change, tmp_path):
    tensors, header = dict(good[1]), dict(good[2])
    change(tensors, header)
    refused(model, write(tmp_path, tensors, header, sign=False), "damaged")


TENSORS = st.builds(
    lambda dtype, shape, value: torch.full(shape, value).to(dtype),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([(), (0,), (7,), (8,), (8, 1), (2, 4)]),
    st.sampled_from([0.0, 0.125, 1.0, -1.0, float("nan"), float("inf"), 3e38]),
)
TENSOR_NAMES = st.sampled_from(
    ["steps", BIAS_OF, PROBS, LOAD, "", ".bias", "x.bias", f"{NAME}.", f"{NAME}.mean_", "../../x.bias"]
)


@pytest.mark.slow
@CALM
@given(changes=st.dictionaries(TENSOR_NAMES, st.one_of(st.none(), TENSORS), min_size=1, max_size=3))
def test_signed_tensors_of_any_content(model, good, changes, tmp_path_factory):
    """Refused, or a state that a training may have left."""
    _, tensors, header = good
    state = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    balancer = phb.get_balancer(model)
    before = balancer.state_dict()
    try:
        balancer.load(write(tmp_path_factory.mktemp("signed"), state, header))
    except ValueError:
        assert_same(balancer.state_dict(), before)
        return
    for name, value in changes.items():
        if name == "steps" and value is not None:
            assert balancer.steps == int(value) >= 0 and value.dtype == torch.int64
        elif value is not None:
            assert value.shape == (8,) and torch.isfinite(value).all() and value.dtype.is_floating_point
            assert name.endswith("bias") or torch.allclose(value, torch.full_like(value, 0.125))
        else:
            assert name == "steps" or name not in tensors
    balancer.load_state_dict(before)


@pytest.mark.slow
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
def test_signed_headers_of_any_content(model, good, headers, tmp_path_factory):
    header = {name: value for name, value in {**good[2], **headers}.items() if value is not None}
    before = everything(model)
    try:
        phb.get_balancer(model).load(write(tmp_path_factory.mktemp("headers"), good[1], header))
    except ValueError as error:
        assert len(str(error)) < 1000
    assert_same(everything(model), before)


@pytest.mark.slow
def test_a_state_of_100_000_routers_is_refused_at_once(model, good, tmp_path):
    described = json.loads(good[2]["model"])
    described["routers"] = {f"{i}.layers.0.mlp.gate": [8, 2, "softmax"] for i in range(100_000)}
    path, start = write(tmp_path, good[1], {**good[2], "model": json.dumps(described)}), time.monotonic()
    refused(model, path, "belongs to another model")
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "overrides", "remedy"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 0, "num_hidden_layers": 4}, "another model"),  # one more layer
        ("gpt_oss", {}, "another model"),  # other names
        ("mixtral", {"num_local_experts": 4}, "4.*8 experts.*another model"),
        ("mixtral", {"num_hidden_layers": 2}, "no 'layers.2"),
        ("mixtral", {"num_hidden_layers": 4}, "another model"),
        ("qwen3_moe", {"mlp_only_layers": []}, "type 'qwen3_moe'.*type 'mixtral'"),  # the same names and sizes
    ],
)
def test_the_state_of_another_model(other, overrides, remedy, tmp_path):
    writer = phb.patch(tiny_model(other, **overrides), BIAS)
    phb.get_balancer(writer).save(tmp_path)
    refused(phb.patch(tiny_model("mixtral"), BIAS), tmp_path, remedy)


def test_another_number_of_experts_per_token_is_the_same_model(tmp_path):
    one, other = trained("mixtral", BIAS), phb.patch(tiny_model("mixtral", num_experts_per_tok=3), BIAS)
    phb.get_balancer(one).save(tmp_path)
    phb.get_balancer(other).load(tmp_path)
    assert_same(duals(other), duals(one))


# ---------------------------------------------------------------------- through `from_pretrained`


@pytest.mark.slow
def test_no_state_and_a_bad_one_beside_a_model(tmp_path, warned):
    trained("mixtral", BIAS).save_pretrained(tmp_path)
    path = tmp_path / STATE_NAME
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    warned.lines.clear()
    with pytest.raises(ValueError, match="damaged"):
        phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_patched(phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=False))
    assert not warned.about(STATE_NAME)
    path.unlink()  # the remedy: fresh duals
    model = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert phb.get_balancer(model).steps == 0 and len(warned.about("start anew")) == 1
    refused(model, tmp_path, "saved while patched")


@pytest.mark.slow
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
        assert phb.get_balancer(loaded).config == phb.PhiBalanceConfig(**BIAS)
    finally:
        (adapter / STATE_NAME).write_bytes(good)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with the adapter of a patched model, and its base beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder / "base")
    base = phb.AutoModelForCausalLM.from_pretrained(folder / "base", phi_balance=BIAS)
    config = LoraConfig(target_modules=["o_proj"], r=2, task_type="CAUSAL_LM")
    phb.patch(get_peft_model(base, config)).save_pretrained(folder / "adapter")
    try:
        phb.AutoModelForCausalLM.from_pretrained(folder / "adapter")
    except ImportError as error:  # transformers 5.6 asks for more than PEFT 0.18 has
        pytest.skip(f"this transformers cannot load an adapter with this PEFT: {error}")
    return folder / "adapter"


@pytest.mark.slow
@CALM
@given(value=json_values)
@example(value=False)
@example(value=[])
@example(value="")
@example(value={})
@example(value="x" * LONG)
@example(value={"x" * LONG: 1, "version": "v" * LONG})
@example(value=json.loads("[" * 100 + "]" * 100))
@example(value={"coef": float("nan")})
@example(value={"coef": 0.1, "from_the_future": 1, "version": "99.0"})
def test_what_a_config_json_says(value, tmp_path_factory):
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
    explicit = phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=BIAS)
    assert phb.get_balancer(explicit).config == phb.PhiBalanceConfig(**BIAS)
