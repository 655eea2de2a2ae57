"""Models that read images: counts and gradients are those of the tokens and patches that their routers route."""

import pytest
import torch
import transformers
from checks import assert_same, is_patched
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tiny import set_prices, tiny_model
from tiny_vlm import IMAGE_TEXT_TYPES, image_batch, tiny_image_model

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs
from hf_phibalance.models import load_any


pytestmark = pytest.mark.slow


COEF = 2.0
FAMILIES = phb.supported_families(images=True)
REFUSED = {"diffusion_gemma": "two means"}
BALANCED = [model_type for model_type in IMAGE_TEXT_TYPES if model_type not in REFUSED]
STEP = (((24, 16), None), (None, (16, 32), (16, 16)), (None,))  # pictures of the rows of three unequal micro-batches


def step_of(model):
    return [image_batch(model, pictures, words=3 + i, seed=i) for i, pictures in enumerate(STEP)]


class Recorder:
    """Outputs of each router in each forward, from hooks of the test: `[{name: [(logits, chosen)]}]`."""

    def __init__(self, sites):
        self.sites, self.forwards = sites, []
        self.handles = [s.modules[0].register_forward_hook(self.noting(s)) for s in sites]

    def noting(self, site):
        def note(module, args, output):
            parts = output if isinstance(output, tuple) else (output,)
            logits = parts[site.read(parts).logits]
            chosen = next((x for x in parts if x.dtype == torch.int64 and x.ndim == 2), None)
            chosen = logits.topk(site.top_k).indices if chosen is None else chosen
            self.forwards[-1].setdefault(site.name, []).append((logits, chosen))

        return note

    def remove(self):
        for handle in self.handles:
            handle.remove()


def counted(name, batch, routed):
    """Mask of the `routed` vectors of a router: the token mask, or ones for patches."""
    mask = batch["attention_mask"].reshape(-1).bool()
    if "moe." in name:  # ernie: `text_moe` and `vision_moe`
        image = batch["moe_mm_token_type_ids"].reshape(-1).bool()
        mask = mask[image] if "vision_moe" in name else mask[~image]
    if "vision_tower" in name:
        assert routed == len(batch["pixel_values"])
        return torch.ones(routed, dtype=torch.bool)
    return mask


def test_all_that_transformers_has_are_found():
    assert len(IMAGE_TEXT_TYPES) >= 5 and {"ernie4_5_vl_moe", "glm4v_moe", "qwen3_vl_moe"} <= set(IMAGE_TEXT_TYPES)
    assert set(IMAGE_TEXT_TYPES) - {"internvl"} == set(FAMILIES)
    assert {model_type for model_type, family in FAMILIES.items() if family.refused} <= set(REFUSED)


@pytest.mark.parametrize("model_type", [t for t in REFUSED if t in IMAGE_TEXT_TYPES])
def test_refused(model_type):
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        phb.patch(tiny_image_model(model_type))


@pytest.mark.parametrize("model_type", BALANCED)
def test_a_step_counts_and_charges_what_is_routed(model_type):
    """Tokens, loads, means and gradient of a step of unequal micro-batches are sums over the recorded outputs."""
    if model_type == "inkling_mm_model":
        pytest.importorskip("scipy")  # its vision tower needs it
    if model_type == "llama4" and Version(transformers.__version__) < Version("5.6"):
        pytest.skip("it reads a field of its config that is not there")
    model = phb.patch(tiny_image_model(model_type).train(), {"coef": 0.0})
    balancer, batches = phb.get_balancer(model), step_of(model)
    assert all(b["input_ids"].shape == b["attention_mask"].shape for b in batches)
    prices = set_prices(model).prices()
    if model_type in FAMILIES:
        assert FAMILIES[model_type].scoring in (balancer.sites[0].scoring, "by config")
        assert (FAMILIES[model_type].selection_bias == "native") is bool(balancer.sites[0].native_bias)
    sites, tokens = balancer.sites, int(sum(b["attention_mask"].sum() for b in batches))

    recorder = Recorder(sites)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    task, defined = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    loads = {site.name: torch.zeros(site.num_experts) for site in sites}
    probs = {site.name: torch.zeros(site.num_experts) for site in sites}
    for batch in batches:
        recorder.forwards.append({})
        torch.manual_seed(0)
        loss, term = model(**batch)[0] / len(batches), 0.0
        for site in sites:
            for logits, chosen in recorder.forwards[-1].get(site.name, []):
                mask = counted(site.name, batch, len(logits))
                assert len(mask) == len(logits)
                p = routing_probs(logits, site.scoring)[mask]
                term = term + COEF / tokens * (p @ prices[site.name]).sum()
                loads[site.name] += chosen[mask].reshape(-1).bincount(minlength=site.num_experts)
                probs[site.name] += p.detach().sum(0)
        for total, value in ((task, loss), (defined, term)):
            found = torch.autograd.grad(
                value, list(parameters.values()), retain_graph=value is loss, allow_unused=True
            )
            for gradient, name in zip(found, parameters):
                if gradient is not None:
                    total[name] += gradient
    recorder.remove()
    balancer.discard_step()

    phb.patch(model, {"coef": COEF, "ema_rate": 1.0})
    balancer = set_prices(model)
    balancer.begin_step(batches)
    for batch in batches:
        torch.manual_seed(0)
        (model(**batch)[0] / len(batches)).backward()
    added = torch.cat([(p.grad - task[n]).double().reshape(-1) for n, p in parameters.items() if p.grad is not None])
    expected = torch.cat([defined[n].double().reshape(-1) for n, p in parameters.items() if p.grad is not None])
    assert expected.norm() > 1e-2
    ratio = float(added @ expected / (expected @ expected))
    assert abs(ratio - 1) < 1e-4 and (added - expected).norm() < 1e-3 * expected.norm(), ratio

    balancer.step()
    metrics = balancer.metrics()
    assert metrics["tokens"] == tokens
    for site in sites:
        assert torch.equal(balancer.loads()[site.name], loads[site.name]), site.name
        torch.testing.assert_close(balancer.means()[site.name], probs[site.name] / probs[site.name].sum())
    apart = {site.modality for site in sites} - {"text"}
    assert {name.split("/")[0] for name in metrics if name.endswith("/gini")} == apart
    term = sum(float(probs[s.name] @ prices[s.name]) for s in sites) * COEF / tokens
    assert metrics["balance_loss"] == pytest.approx(term, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------- loading, saving, publishing


def trained_on_images(model_type):
    model = phb.patch(tiny_image_model(model_type).train(), {"coef": 0.5, "bias_coef": 0.01})
    for seed in range(2):
        batch = image_batch(model, seed=seed)
        model(**batch)[0].backward()
        phb.get_balancer(model).step()
    return model.eval()


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_comes_back_patched_with_its_duals(model_type, tmp_path):
    model = trained_on_images(model_type)
    model.save_pretrained(tmp_path)
    batch = image_batch(model, seed=9)
    with torch.no_grad():
        expected = model(**batch).logits
        for loaded in (
            phb.AutoModelForImageTextToText.from_pretrained(tmp_path),
            phb.AutoModelForImageTextToText.from_pretrained(tmp_path, phi_balance={"coef": 0.25, "bias_coef": 0.01}),
            load_any(str(tmp_path)),
            enabled_load(tmp_path),
        ):
            assert type(loaded) is type(model)
            assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    plain = phb.AutoModelForImageTextToText.from_pretrained(tmp_path, phi_balance=False)
    assert not is_patched(plain)


def enabled_load(folder):
    phb.enable()
    try:
        return transformers.AutoModelForImageTextToText.from_pretrained(folder, phi_balance=True)
    finally:
        phb.disable()


def test_each_checkpoint_is_loaded_by_the_class_it_was_saved_with(tmp_path):
    model_type = "qwen3_5_moe"  # it has two classes, and older transformers cannot build the one for text
    models = [("images", tiny_image_model(model_type))] if model_type in IMAGE_TEXT_TYPES else []
    if Version(transformers.__version__) >= Version("5.14"):
        models.append(("text", tiny_model(model_type)))
    for name, model in models:
        model.save_pretrained(tmp_path / name)
        assert type(load_any(str(tmp_path / name))) is type(model)
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    assert not is_patched(load_any(str(tmp_path / "mixtral")))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.14"), reason="it loads no adapter with the PEFT of its time"
)
def test_an_adapter_is_loaded_by_the_class_of_its_base_model(tmp_path):
    tiny_image_model("qwen3_vl_moe").save_pretrained(tmp_path / "base")
    base = load_any(str(tmp_path / "base"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert type(load_any(str(tmp_path / "adapter")).get_base_model()) is type(base)


def test_the_card_names_the_class(tmp_path):
    phb.push_to_hub(trained_on_images("qwen3_vl_moe"), "me/sees", dry_run=tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "phb.AutoModelForImageTextToText.from_pretrained" in card and "AutoModelForCausalLM" not in card
    assert "pipeline_tag: image-text-to-text" in card
