"""Writes the `moe.jsonl` of a made run, by the functions that a watched run uses."""

from types import SimpleNamespace

import torch

from hf_phibalance.watching import RECORDS_NAME, append_record, layer_figures


def write_run(folder, step=0, layers=2, experts=8, model="org/model", names=()):
    """Begins a run, or resumes it from `step`. Returns its routers."""
    sites = [
        SimpleNamespace(name=name, num_experts=experts, top_k=2, scoring="softmax")
        for name in names or [f"model.layers.{number}.mlp.gate" for number in range(layers)]
    ]
    routers = [{"name": site.name, "experts": experts, "top_k": 2, "scoring": "softmax"} for site in sites]
    run = {"step": step, "model": model, "model_type": "mixtral", "method": "none", "routers": routers}
    append_record(folder / RECORDS_NAME, {"run": run | {"versions": {"torch": "2.13.0", "transformers": "5.20.0"}}})
    return sites


def write_row(folder, sites, step, load_LE, loss=None, steps=10, confidence=(0.5, 0.75, 1.5)):
    """Writes a log of `steps` optimizer steps with the loads of all routers."""
    load_LE = torch.as_tensor(load_LE).double()
    tokens = load_LE.sum(-1, keepdim=True) / 2
    means_L4 = torch.tensor([[*confidence, 1.0]]) * tokens if confidence else torch.zeros(len(load_LE), 4)
    row = {"step": step, "steps": steps, "tokens": int(tokens[0]), "loss": loss}
    if loss is None:
        del row["loss"]
    append_record(folder / RECORDS_NAME, row | {"layers": layer_figures(sites, load_LE, load_LE, means_L4)})


def write_alert(folder, step, layer, kind="dead_experts", experts=(3,), reason="no token.", remedy="balance."):
    alert = {"kind": kind, "layer": layer, "experts": list(experts), "reason": reason, "remedy": remedy}
    append_record(folder / RECORDS_NAME, {"step": step, "alert": alert})


def write_collapse(folder, layers=2, experts=8, rows=30, collapsing=1):
    """Writes a run of which one layer collapses onto its first expert, and another loses its last expert."""
    generator = torch.Generator().manual_seed(0)
    sites = write_run(folder, layers=layers, experts=experts)
    for number in range(1, rows + 1):
        load_LE = torch.randint(900, 1100, (layers, experts), generator=generator)
        share = number / rows
        load_LE[collapsing, 0] += int(load_LE[collapsing].sum() * 0.7 * share)
        load_LE[0, -1] *= number < rows // 2
        load_LE[:, 0] += load_LE.sum(-1) % 2
        write_row(folder, sites, 10 * number, load_LE, loss=2.0 + 4.0 / number)
        if number == rows // 2:
            reason = f"No token chose expert {experts - 1} of layer 0 in the last 50 steps."
            remedy = "Balance it: phb.patch(model, {'coef': 0.01})."
            write_alert(folder, 10 * number, sites[0].name, experts=[experts - 1], reason=reason, remedy=remedy)
        if number == rows - 2:
            reason = "Expert 0 gets half of all tokens of layer 1, which chance explains in no run."
            remedy = "Lower the learning rate of the routers, or balance them."
            write_alert(folder, 10 * number, sites[collapsing].name, "collapse", [0], reason, remedy)
    return sites
