# ruff: noqa: E402 (it runs from a checkout)
"""A table of what works on the installed transformers: `python tests/version_table.py [-v] [model types] > table.md`.

Fails (exit status 1) if a family that can be had here does not pass every check.

For every causal-LM model type with experts, a tiny random model is patched and compared with references that use nothing
of the package but its definitions: logits are caught where the router's weight is multiplied, choices where the experts
are handed them.
"""

import contextlib
import sys
import tempfile
import traceback
import warnings
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parent.parent)]

import torch
import torch.nn.functional as F
import transformers
from tiny import MODEL_TYPES, set_prices, tiny_batch, tiny_model
from torch.overrides import TorchFunctionMode

import hf_phibalance as phb
from hf_phibalance.maths import SCORINGS
from hf_phibalance.routers import find_routers, router_matrix
from hf_phibalance.routers.families import declared_kinds


COEF = 2.0
COLUMNS = ("found", "pattern", "scoring", "gradient", "loads", "probs", "bias", "save/load")


class Linears(TorchFunctionMode):
    """Notes the products with the weights of `routers`, `{name: matrix}`."""

    def __init__(self, routers):
        super().__init__()
        self.routers, self.seen = routers, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            for name, matrix in self.routers.items():
                if args[1].shape == matrix.shape and args[1].data_ptr() == matrix.data_ptr():
                    self.seen[name] = result.reshape(-1, result.shape[-1])
        return result


@contextlib.contextmanager
def noted(balancer):
    """What reached the experts, and what the routers returned: `{name: (tensors handed over, tensors returned)}`."""
    handed, returned, handles = {}, {}, []
    for site in balancer.sites:
        experts = getattr(site.parent, "experts", None)
        if experts is not None:

            def before(module, args, kwargs, name=site.name):
                handed[name] = [x for x in (*args, *kwargs.values())[1:] if isinstance(x, torch.Tensor)]

            handles.append(experts.register_forward_pre_hook(before, with_kwargs=True))

        def after(module, args, output, name=site.name):
            returned[name] = list(output) if isinstance(output, tuple) else [output]

        handles.append(site.modules[0].register_forward_hook(after))
    yield handed, returned
    for handle in handles:
        handle.remove()


def definition(logits, scoring):
    """Routing probabilities of logits, by autograd's own operations."""
    if scoring in ("softmax", "probs"):
        return torch.softmax(logits.float(), -1)
    scores = SCORINGS[scoring].score(logits.float())
    return scores / scores.sum(-1, keepdim=True)


def run(model, batch, balancer):
    """One forward: output, logits by site name, what was handed to experts, what was returned."""
    matrices = {s.name: router_matrix(s.router) for s in balancer.sites}
    matrices = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    torch.manual_seed(0)
    with noted(balancer) as (handed, returned), Linears(matrices) as linears:
        output = model(**batch)
    logits = {}
    for site in balancer.sites:
        caught = linears.seen.get(site.name)
        if caught is None or caught.shape[-1] != site.num_experts:  # no single matrix, or more rows than experts
            parts = returned[site.name]
            caught = parts[site.read(parts).logits]
        logits[site.name] = caught
    return output, logits, handed, returned


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def indices(site, handed, returned, logits, bias=None):
    """The experts `(T, k)` of each token, as the experts are told, the router says or (neither) by the top-k of logits."""
    if not site.kind.traits.returns_choice:
        ranked = torch.softmax(logits, -1) + (0 if bias is None else bias)
        return ranked.topk(site.top_k).indices
    for parts in (handed.get(site.name, ()), returned.get(site.name, ())):
        for part in parts:
            if isinstance(part, torch.Tensor) and not part.is_floating_point() and part.ndim == 2:
                return part
    return logits.topk(site.top_k).indices


def check_gradient(model, batch):
    phb.patch(model, {"coef": 0.0})
    balancer = phb.get_balancer(model)
    torch.manual_seed(0)
    task = gradients(model, model(**batch).loss)
    prices = set_prices(model).prices()
    _, logits, _, _ = run(model, batch, balancer)
    balancer.discard_step()
    mask = batch["attention_mask"].reshape(-1).float()
    term = sum(
        ((definition(logits[s.name], s.scoring) * prices[s.name]).sum(-1) * mask).sum() / mask.sum()
        for s in balancer.sites
    )
    expected = gradients(model, COEF * term)
    phb.unpatch(model)
    phb.patch(model, {"coef": COEF})
    set_prices(model)
    torch.manual_seed(0)
    charged = gradients(model, model(**batch).loss)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3, "the definition has no gradient"
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5, msg=name
        )


def check_loads(model, batch):
    phb.patch(model, {"coef": 0.5, "ema_rate": 1.0})
    balancer = phb.get_balancer(model)
    output, logits, handed, returned = run(model, batch, balancer)
    output.loss.backward()
    balancer.step()
    mask = batch["attention_mask"].reshape(-1).bool()
    for site in balancer.sites:
        chosen = indices(site, handed, returned, logits[site.name], site.read_native_bias())[mask]
        counts = torch.bincount(chosen.reshape(-1), minlength=site.num_experts).float()
        assert torch.equal(balancer.loads()[site.name], counts), (
            f"{site.name}: {balancer.loads()[site.name]} != {counts}"
        )
        assert counts.sum() == mask.sum() * site.top_k, f"{site.name}: {counts.sum()} of {mask.sum()} x {site.top_k}"
        probs = definition(logits[site.name].detach(), site.scoring)[mask].mean(0)
        torch.testing.assert_close(balancer.means()[site.name], probs, rtol=1e-5, atol=1e-6)


def check_probs(model, batch):
    """The weights of the chosen experts are proportional to the probabilities that are priced."""
    phb.patch(model, {"coef": 0.0})
    balancer, checked = phb.get_balancer(model), False
    with torch.no_grad():
        _, logits, handed, returned = run(model, batch, balancer)
    for site in balancer.sites:
        chosen = indices(site, handed, returned, logits[site.name], site.read_native_bias())
        for parts in (handed.get(site.name, ()), returned.get(site.name, ())):
            weights = [
                x for x in parts if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape == chosen.shape
            ]
            if weights:
                scale = getattr(site.modules[0], "per_expert_scale", None)  # of gemma4
                weights = weights if scale is None else [weights[0] / scale[chosen]]
                ratio = weights[0] / definition(logits[site.name], site.scoring).gather(-1, chosen)
                torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
                checked = True
                break
    return None if checked else "not handed over"


def check_bias(model, batch):
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    biases = balancer.biases()
    for site in balancer.sites:
        biases[site.name].zero_()[: site.top_k] = 50.0
    balancer.set_biases(biases)
    output, logits, handed, returned = run(model, batch, balancer)
    output.loss.backward()
    before = balancer.biases()
    balancer.step()
    for site in balancer.sites:
        load = balancer.loads()[site.name]
        assert load[: site.top_k].sum() == load.sum() > 0, f"{site.name}: {load}"
        bias = biases[site.name]
        used = indices(site, handed, returned, logits[site.name] + 0 * bias, bias)
        if handed.get(site.name) and site.kind.traits.returns_choice and len(handed[site.name]) > 1:
            assert int(used.max()) < site.top_k, f"{site.name}: the experts were handed {used.unique()}"
        moved = balancer.biases()[site.name] - before[site.name]
        assert moved[: site.top_k].max() < 0 < moved[site.top_k :].min(), f"{site.name}: {moved}"
    return "native" if balancer.sites[0].native_bias else "re-selected"


def check_saving(model, batch):
    phb.patch(model, {"coef": 0.5, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    model(**batch).loss.backward()
    balancer.step()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = phb.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        state, loaded = balancer.state_dict(), phb.get_balancer(again).state_dict()
        assert state.keys() == loaded.keys()
        for name in state:
            torch.testing.assert_close(loaded[name], state[name], msg=name)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-4)


SAMPLED = "none: its experts are sampled"
CHECKS = {
    "gradient": check_gradient,
    "loads": check_loads,
    "probs": check_probs,
    "bias": check_bias,
    "save/load": check_saving,
}


def reason(error):
    return f"{type(error).__name__}: {str(error).strip()}".replace("\n", " ").replace("|", "/")[:160]


def row(model_type, verbose=False):
    cells = dict.fromkeys(COLUMNS, "")
    try:
        model = tiny_model(model_type).train()
        sites = find_routers(model)
    except ValueError as error:
        if "balance" in str(error):
            return {**cells, "found": f"refused: {reason(error)}"}
        return {**cells, "found": f"no tiny model: {reason(error)}"}
    except Exception as error:
        return {**cells, "found": f"no tiny model: {reason(error)}"}
    batch = tiny_batch(model)
    try:
        model(**batch).loss.backward()
    except Exception as error:
        return {**cells, "found": f"the model itself fails: {reason(error)}"}
    site, declared = sites[0], {k.target for m in model.modules() for k in declared_kinds(type(m))}
    cells["found"] = (
        f"{len(sites)} {'declared' if any(isinstance(site.modules[0], k) for k in declared) else 'by contract'}"
    )
    cells["pattern"] = f"{type(site.modules[0]).__name__}{', block chooses' if site.kind.block else ''}"
    cells["scoring"] = site.scoring
    for name, check in CHECKS.items():
        try:
            cells[name] = check(tiny_model(model_type).train(), batch) or "ok"
        except Exception as error:
            cells[name] = SAMPLED if site.kind.traits.no_bias and name not in ("gradient", "loads") else reason(error)
            if verbose:
                traceback.print_exc()
    return cells


def outcome(cells):
    """`"ok"`, `"failed"`, `"refused"` by us, or `"absent"`: this version cannot build or train it."""
    if not cells["scoring"]:
        return "refused" if cells["found"].startswith("refused") else "absent"
    good = ("ok", "native", "re-selected", "not handed over", SAMPLED)
    return "ok" if all(cells[name] in good for name in CHECKS) else "failed"


def prepare():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main():
    prepare()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print(f"| model type | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    failed = []
    for model_type in [arg for arg in sys.argv[1:] if not arg.startswith("-")] or MODEL_TYPES:
        cells = row(model_type, verbose="-v" in sys.argv)
        print(f"| `{model_type}` | {' | '.join(str(cells[name]) for name in COLUMNS)} |", flush=True)
        failed += [model_type] * (outcome(cells) == "failed")
    print(f"\nFailed: {', '.join(failed) or 'none'}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
