"""The file that keeps means and biases beside a model's weights, and whether a state fits a model.

Its format is that of safetensors. Its header holds the version that wrote it, the configuration, what model it belongs to, and a checksum
over all of that and the tensors: what is read is what was written, or it is refused.
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
from ..durable import replacing
from ..files import parse_json
from ..routers import RouterSite
from ..sidecar import EARLIER_STATE_NAME, STATE_NAME, state_in


LAYOUT = "2"  # of the header; raise it when a reader of the present one would misunderstand the file
HEADER = {"format", "version", "config", "layout", "model", "checksum"}
FIRST_HEADER = {"format", "version", "config"}  # of version 0.1.0, which had neither checksum nor model
FIRST_VERSIONS = ("0.1.0", "0+unknown")
LARGEST = 2**28  # bytes; the duals of a thousand layers of two thousand experts have a tenth of it
SUM_TOLERANCE = 1e-3  # by which the sum of a mean may miss 1


@dataclass(frozen=True)
class StateFile:
    """What [`read_state`] found: the tensors, and what the file says of where they come from."""

    tensors: dict[str, Tensor]
    model: dict[str, Any] | None
    config: dict[str, Any]  # that led to them


def describe_model(root: nn.Module, sites: Sequence[RouterSite]) -> dict[str, Any]:
    """What a state file says of its model: its type, and of each router the experts, how many are chosen, the scoring."""
    model_type = getattr(getattr(root, "config", None), "model_type", type(root).__name__)
    return {"type": model_type, "routers": {s.name: [s.num_experts, s.top_k, s.scoring] for s in sites}}


# ---------------------------------------------------------------------- the file


def save_state(
    state: dict[str, Tensor], config: PhiBalanceConfig, model: dict[str, Any], directory: str | os.PathLike
) -> Path:
    """
    Writes `phi_balance.state` into `directory` (made if missing) and returns its path. Whatever happens meanwhile, a kill, a
    full disk or a loss of power, under that name is the whole file or the one that was there before. What an earlier version
    wrote there under another name goes when the new file has reached the disk.

    Args:
        state (`dict[str, Tensor]`): as [`PhiBalancer.state_dict`] returns it.
        config (`PhiBalanceConfig`): the configuration that led to it.
        model (`dict`): as [`describe_model`] returns it.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(directory) / STATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "format": "pt",
        "version": package_version(),
        "layout": LAYOUT,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "model": json.dumps(model),
    }
    header["checksum"] = checksum(state, header)
    try:
        with replacing(path) as partial:
            save_file(state, partial, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); what was there before is untouched.") from error
    earlier = path.with_name(EARLIER_STATE_NAME)
    if _is_ours(earlier):
        earlier.unlink(missing_ok=True)
    return path


def checksum(state: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, and over the header without its checksum."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def read_state(directory: str | os.PathLike) -> StateFile:
    """
    What [`save_state`] wrote, from the file or from its directory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, was not written by this package, or by a version that this one does not understand.
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
            whole = "checksum" not in header or header["checksum"] == checksum(tensors, header)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    if not whole:
        raise _damaged(path, "its checksum does not fit its content")
    try:
        config = parse_json(header["config"])
        model = parse_json(header["model"]) if "model" in header else None
    except ValueError as error:
        raise _damaged(path, f"its header holds no JSON: {error}") from error
    if not isinstance(config, dict) or not (model is None or _describes_model(model)):
        raise _damaged(path, "it does not say what configuration, model and routers it belongs to")
    return StateFile(tensors, model, config)


def _is_ours(path: Path) -> bool:
    """Whether `path` is a state that some version of this package wrote, by its header."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).keys() >= FIRST_HEADER
    except (SafetensorError, UnicodeDecodeError, OSError):
        return False


def _describes_model(model: Any) -> bool:
    """Whether this is what [`describe_model`] says of some model."""
    return (
        isinstance(model, dict)
        and isinstance(model.get("type"), str)
        and isinstance(model.get("routers"), dict)
        and all(isinstance(router, list) and len(router) == 3 for router in model["routers"].values())
    )


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}); copy it again from where it was written, or delete it to start with fresh duals."
    )


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    """Refuses a file of another program, or of a version of this one whose header means something else."""
    if not header.keys() >= FIRST_HEADER:
        raise ValueError(
            f"{path} was not written by hf_phibalance: its header has no {sorted(FIRST_HEADER - header.keys())}. Use a file "
            "that PhiBalancer.save or save_pretrained wrote, or delete it to start with fresh duals."
        )
    if header.keys() == FIRST_HEADER and header["version"] in FIRST_VERSIONS:
        return
    if header.get("layout") != LAYOUT:
        raise ValueError(
            f"{path} was written by hf_phibalance {header['version']} with header layout {header.get('layout')!r}; this is "
            f"version {package_version()}, which reads layout {LAYOUT!r} and the files of version 0.1.0. Use the version that "
            "wrote it, or delete it to start with fresh duals."
        )
    if header.keys() != HEADER:
        raise _damaged(
            path, f"its header holds {sorted(header.keys() ^ HEADER)} where nothing or something else belongs"
        )


def config_in(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration that wrote the state file `path`: an adapter has no config.json to keep it in. Raises as [`read_state`]."""
    return read_state(path).config


# ---------------------------------------------------------------------- whether it fits


def check_model(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """
    Refuses the state of another model, even one whose routers have the same names and sizes.

    Args:
        saved (`Mapping`), present (`Mapping`): what [`describe_model`] said when it was written, and says now.

    Raises:
        ValueError: naming what differs.
    """
    remedy = "Load the state that was saved with this model, or start with fresh duals."
    if saved["type"] != present["type"]:
        raise ValueError(
            f"the φ-balance state belongs to another model, of type {saved['type']!r}; this one is of type "
            f"{present['type']!r}. {remedy}"
        )
    ours, theirs = present["routers"], saved["routers"]
    for whose, has, lacks in (("it", ours, theirs), ("this model", theirs, ours)):
        if missing := [name for name in has if name not in lacks]:
            raise ValueError(
                f"the φ-balance state belongs to another model: {whose} has no {missing[0]} (and {len(missing) - 1} more "
                f"such routers). {remedy}"
            )
    for name, router in ours.items():
        for what, now, then in zip(("experts", "experts per token", "scoring"), router, theirs[name]):
            if now != then:
                raise ValueError(
                    f"the φ-balance state was written for {then} {what} in {name!r}, which has {now} {what} here: it belongs "
                    f"to another model. {remedy}"
                )


def check_state(state: Mapping[str, Tensor], sites: Sequence[RouterSite], kinds: Sequence[str]) -> None:
    """
    Refuses a state that does not fit the routers `sites`, or that no training can have led to.

    Args:
        state (`Mapping[str, Tensor]`): as [`PhiBalancer.state_dict`] returns it.
        kinds (`Sequence[str]`): what there has to be of each router, e.g. `["mean_probs", "bias"]`.

    Raises:
        ValueError: naming the tensor that is missing, of another type or shape, no distribution where it has to be one,
            not finite, or of no router of this model.
    """
    names = [site.name for site in sites]
    for key in state:
        layer, _, kind = key.rpartition(".")
        known_kind = kind == "bias" or kind.removeprefix("mean_") in STATISTICS
        if key != "steps" and not (layer in names and known_kind):
            raise ValueError(
                f"the φ-balance state holds {key!r}, but this model's routers are {names[0]!r} ... "
                f"{names[-1]!r}: it belongs to another model. Load the state saved with this one."
            )
    _check_steps(state.get("steps"))
    for site, kind in itertools.product(sites, kinds):
        name = f"{site.name}.{kind}"
        tensor = state.get(name)
        if tensor is None:
            raise ValueError(
                f"the φ-balance state has no {name}: it was written with other `track`/`bias_track` "
                "settings or for another model. Use the configuration beside it, or start with fresh duals."
            )
        if tensor.shape != (site.num_experts,):
            raise ValueError(
                f"{name} in the φ-balance state has shape {tuple(tensor.shape)}, but this router has "
                f"{site.num_experts} experts: it belongs to another model. Load the state saved with this one."
            )
        _check_values(name, tensor, is_mean=kind != "bias")


def _check_steps(steps: Tensor | None) -> None:
    if steps is None:
        return
    if steps.dtype != torch.int64 or steps.numel() != 1 or int(steps) < 0:
        raise ValueError(
            f"steps in the φ-balance state must be one whole number >= 0, got {steps!r}; use an earlier checkpoint."
        )


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
