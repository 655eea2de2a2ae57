"""
Writes and reads the file `phi_balance.state` next to a model's weights, and checks that a state fits a model. Format 1:

- The container is safetensors, with a file name that no engine takes for weights.
- Tensors: `steps` (int64, one number); for each router `{router}.mean_probs` and `{router}.mean_load`; and `{router}.bias` if there
  is a selection bias; each `(E,)` in fp32. `{router}` is its name relative to the backbone (`model.base_model`), for example
  `layers.0.mlp.gate`.
- Header: `format` "pt"; `phi_balance` "1"; `version` of this package; `config`, the [`PhiBalanceConfig`] as JSON; `model` as JSON,
  `{"type": model type of the language model, "routers": {router: [experts, experts per token, scoring]}, "weights": fingerprint of
  the first router's weight, or ""}`; and `checksum`, SHA-256 over the rest of the header and all tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import STATISTICS, PhiBalanceConfig, package_version
from ..files import STATE_NAME, parse_json, quoted, replacing, state_in
from ..routers import RouterSite, router_matrix


FORMAT = "1"  # raise it when a reader of the present one would misunderstand the file
HEADER = {"format", "phi_balance", "version", "config", "model", "checksum"}
LARGEST = 2**28  # bytes; the duals of a thousand layers of two thousand experts need a tenth of it
SUM_TOLERANCE = 1e-3  # allowed distance of the sum of a mean from 1


@dataclass(frozen=True)
class StateFile:
    """Content of a state file: tensors, description of the model, and the configuration of the training."""

    tensors: dict[str, Tensor]
    model: dict[str, Any]
    config: dict[str, Any]


def describe_model(root: nn.Module, sites: Sequence[RouterSite], names: Sequence[str]) -> dict[str, Any]:
    """Describes a model for its state file: type of the language model, and sizes and scoring of each router (`names`)."""
    config: Any = getattr(root, "config", None)
    model_type = type(root).__name__ if config is None else config.get_text_config().model_type
    routers = {n: [s.num_experts, s.top_k, s.scoring] for n, s in zip(names, sites)}
    return {"type": model_type, "routers": routers, "weights": fingerprint(sites[0])}


def fingerprint(site: RouterSite) -> str:
    """Returns a hash of a router's weight in bf16, the same for fp32 and bf16; `""` if it is sharded, packed or in fp16."""
    weight = router_matrix(site.router)
    if weight is None or weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_meta:
        return ""
    if type(weight) not in (nn.Parameter, Tensor) or not weight.numel():
        return ""
    rounded = weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]


def save_state(
    state: dict[str, Tensor], config: PhiBalanceConfig, model: dict[str, Any], directory: str | os.PathLike
) -> Path:
    """
    Writes `phi_balance.state` into `directory` (made if missing) and returns its path. After a kill, a full disk or a loss of
    power it holds the whole new file or the old one. Raises `OSError` if it cannot be written.
    """
    path = Path(directory) / STATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "format": "pt",
        "phi_balance": FORMAT,
        "version": package_version(),
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "model": json.dumps(model),
    }
    header["checksum"] = checksum(state, header)
    try:
        with replacing(path) as partial:
            save_file(state, partial, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); what was there before is untouched.") from error
    return path


def checksum(state: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Returns SHA-256 over names, types, shapes and bytes of all tensors, and over the header without its checksum."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def read_state(directory: str | os.PathLike) -> StateFile:
    """
    Reads the file that [`save_state`] wrote, given its path or its directory. Raises `FileNotFoundError` without a file, and
    `ValueError` if it is damaged, or was written by another program or in another format.
    """
    path = Path(directory)
    path = state_in(path) or path / STATE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no φ-balance state at {path}; was the model saved while patched?")
    if path.stat().st_size > LARGEST:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, more than the duals of any model")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            whole = header["checksum"] == checksum(tensors, header)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise _damaged(path, quoted(str(error))) from error
    if not whole:
        raise _damaged(path, "its checksum does not fit its content")
    try:
        config, model = parse_json(header["config"]), parse_json(header["model"])
    except ValueError as error:
        raise _damaged(path, f"its header holds no JSON: {error}") from error
    kinds = {"type": str, "routers": dict, "weights": str}
    is_whole = isinstance(config, dict) and isinstance(model, dict)
    is_whole = is_whole and all(isinstance(model.get(name), kind) for name, kind in kinds.items())
    if not is_whole or not all(isinstance(r, list) and len(r) == 3 for r in model["routers"].values()):
        raise _damaged(path, "it does not say what configuration, model and routers it belongs to")
    return StateFile(tensors, model, config)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}); copy it again from where it was written, or delete it to start with fresh duals."
    )


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    """Refuses a file of another program or in another format."""
    if "phi_balance" not in header:
        raise ValueError(
            f"{path} was not written by hf_phibalance: its header has no 'phi_balance'. Use a file that PhiBalancer.save or "
            "save_pretrained wrote, or delete it to start with fresh duals."
        )
    if header["phi_balance"] != FORMAT:
        raise ValueError(
            f"{path} was written by hf_phibalance {quoted(header.get('version'))} in format {quoted(header['phi_balance'])}; this "
            f"is version {package_version()}, which reads format {FORMAT!r}. Use the version that wrote it, or delete it to start "
            "with fresh duals."
        )
    if header.keys() != HEADER:
        wrong = quoted(sorted(header.keys() ^ HEADER))
        raise _damaged(path, f"its header holds {wrong} where nothing or something else belongs")


def fit_names(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """
    Renames the routers in `state` to `names`, those of this model. One of the two may have the path of the language model in a
    vision-language model in front.
    """
    saved, own = {key.rpartition(".")[0] for key in state if "." in key}, set(names)
    for short, long in ((own, saved), (saved, own)) if saved and not saved & own else ():
        first = min(short, default="")
        for prefix in {name.removesuffix(first) for name in long if name.endswith(f".{first}")}:
            longer = {f"{prefix}{name}": name for name in short}
            if longer.keys() <= long:
                renamed = longer if short is own else {name: full for full, name in longer.items()}
                parts = [(*key.rpartition("."), value) for key, value in state.items()]
                return {f"{renamed.get(r, r)}{dot}{kind}": v for r, dot, kind, v in parts if not r or r in renamed}
    return dict(state)


def check_model(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuses the state of another model, by the results of [`describe_model`] when it was saved and at present."""
    remedy = "Load the state that was saved with this model, or start with fresh duals."
    if saved["type"] != present["type"]:
        raise ValueError(
            f"the φ-balance state belongs to another model, of type {quoted(saved['type'])}; this one is of type "
            f"{present['type']!r}. {remedy}"
        )
    ours = present["routers"]
    theirs = fit_names({f"{name}.": router for name, router in saved["routers"].items()}, list(ours))
    theirs = {name.removesuffix("."): router for name, router in theirs.items()}
    for whose, has, lacks in (("it", ours, theirs), ("this model", theirs, ours)):
        if missing := [name for name in has if name not in lacks]:
            raise ValueError(
                f"the φ-balance state belongs to another model: {whose} has no {quoted(missing[0])} (and {len(missing) - 1} "
                f"more such routers). {remedy}"
            )
    for name, router in ours.items():
        for what, now, then in zip(("experts", "experts per token", "scoring"), router, theirs[name]):
            if now != then and what != "experts per token":  # may be set anew when a model is loaded
                raise ValueError(
                    f"the φ-balance state was written for {quoted(then)} {what} in {name!r}, which has {now} {what} here: it "
                    f"belongs to another model. {remedy}"
                )


def check_state(state: Mapping[str, Tensor], experts: Mapping[str, int]) -> None:
    """
    Refuses a [`PhiBalancer.state_dict`] that does not fit the routers, or that cannot come from a training. Raises `ValueError`
    naming the tensor. `experts`: number of experts of each router, by its name in the state.
    """
    names, kinds = list(experts), [f"mean_{statistic}" for statistic in STATISTICS]
    for key in state:
        layer, _, kind = key.rpartition(".")
        if key != "steps" and not (layer in experts and kind in (*kinds, "bias")):
            raise ValueError(
                f"the φ-balance state holds {quoted(key)}, but this model's routers are {names[0]!r} ... "
                f"{names[-1]!r}: it belongs to another model. Load the state saved with this one."
            )
    steps = state.get("steps")
    if steps is not None and (steps.dtype != torch.int64 or steps.numel() != 1 or int(steps) < 0):
        raise ValueError(
            f"steps in the φ-balance state must be one whole number >= 0, got {quoted(steps.flatten()[:8].tolist())}; use an "
            "earlier checkpoint."
        )
    if any(key.endswith(".bias") for key in state):
        kinds.append("bias")
    for router, kind in itertools.product(names, kinds):
        name = f"{router}.{kind}"
        tensor = state.get(name)
        if tensor is None:
            raise ValueError(
                f"the φ-balance state has no {name}: it was written for another model, or is incomplete. Use the state saved with "
                "this model, or start with fresh duals."
            )
        if tensor.shape != (experts[router],):
            raise ValueError(
                f"{name} in the φ-balance state has shape {tuple(tensor.shape)}, but this router has "
                f"{experts[router]} experts: it belongs to another model. Load the state saved with this one."
            )
        _check_values(name, tensor, is_mean=kind != "bias")


def _check_values(name: str, tensor: Tensor, is_mean: bool) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} in the φ-balance state is of type {tensor.dtype}, which has rounded it: means and biases are kept in "
            "float32. Use the file as it was written; it is not to be cast with the weights."
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} in the φ-balance state is not finite; use an earlier checkpoint.")
    if is_mean and (bool((tensor < 0).any()) or abs(float(tensor.double().sum()) - 1) > SUM_TOLERANCE):
        raise ValueError(
            f"{name} in the φ-balance state is no distribution over experts: its entries lie between {float(tensor.min()):.3g} "
            f"and {float(tensor.max()):.3g} and sum to {float(tensor.sum()):.6g}, not to 1. It was changed after it was "
            "written; use an earlier checkpoint."
        )
