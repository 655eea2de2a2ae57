"""The file that keeps means and biases beside a model's weights, and whether a state fits a model."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import STATISTICS, PhiBalanceConfig, package_version
from ..routers import RouterSite


STATE_NAME = "phi_balance.safetensors"


def save_state(state: dict[str, Tensor], config: PhiBalanceConfig, directory: str | os.PathLike) -> Path:
    """
    Writes `phi_balance.safetensors` into `directory` (made if missing) and returns its path.

    Args:
        state (`dict[str, Tensor]`): as [`PhiBalancer.state_dict`] returns it.
        config (`PhiBalanceConfig`): the configuration that led to it.
    """
    path = Path(directory) / STATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "version": package_version(), "config": json.dumps(config.to_dict())}
    partial = path.with_suffix(".partial")  # a kill while writing must not leave half a file under the real name
    save_file(state, partial, metadata=header)
    os.replace(partial, path)
    return path


def read_state(directory: str | os.PathLike) -> dict[str, Tensor]:
    """
    What [`save_state`] wrote, from the file or from its directory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    path = Path(directory)
    path = path / STATE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no φ-balance state at {path}; was the model saved while patched?")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again from where it was written, or delete it to start with "
            "fresh duals."
        ) from error


def config_in(path: str | os.PathLike) -> dict[str, Any] | None:
    """The configuration that wrote the state file `path`: an adapter has no config.json to keep it in."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("config", "null"))
    except SafetensorError:
        return None  # damaged: loading it says so


def check_state(state: Mapping[str, Tensor], sites: Sequence[RouterSite], kinds: Sequence[str]) -> None:
    """
    Refuses a state that does not fit the routers `sites`.

    Args:
        state (`Mapping[str, Tensor]`): as [`Duals.state_dict`] returns it.
        kinds (`Sequence[str]`): what there has to be of each router, e.g. `["mean_probs", "bias"]`.

    Raises:
        ValueError: naming the tensor that is missing, of another shape, not finite, or of no router of this model.
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
    for site, kind in itertools.product(sites, kinds):
        tensor = state.get(f"{site.name}.{kind}")
        if tensor is None:
            raise ValueError(
                f"the φ-balance state has no {site.name}.{kind}: it was written with other `track`/`bias_track` "
                "settings or for another model. Use the configuration beside it, or start with fresh duals."
            )
        if tensor.shape != (site.num_experts,):
            raise ValueError(
                f"{site.name}.{kind} in the φ-balance state has shape {tuple(tensor.shape)}, but this router has "
                f"{site.num_experts} experts: it belongs to another model. Load the state saved with this one."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{site.name}.{kind} in the φ-balance state is not finite; use an earlier checkpoint.")
