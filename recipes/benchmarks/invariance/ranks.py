"""Real processes on this machine that form a gloo group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


IMPORTED = [
    "torch",
    "transformers",
    "transformers.models.mixtral.modeling_mixtral",
    "trl",
    "peft",
    "datasets",
    "hf_phibalance",
]


def in_ranks(function: Callable, ranks: int, *args: Any) -> list[Any]:
    """
    Runs `function(*args)` in `ranks` gloo processes on this machine.

    `function` has to be importable (it is pickled by name) and its result plain data: tensors die with their process,
    numpy arrays do not. The first process that fails takes the others with it.

    They are forked from a process that has done nothing but import what all need, once for all calls.

    Returns:
        `list`: what it returned, by rank.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    config = LaunchConfig(
        1,
        1,
        ranks,
        run_id="here",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    results = elastic_launch(config, _in_group)(function, *args)
    return [results[rank] for rank in range(ranks)]


def _in_group(function: Callable, *args: Any) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
