"""Runs a function in several real processes that form a gloo group."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_ranks(function, ranks, *args):
    """
    `function(*args)` in each of `ranks` processes, on loopback; what it returned by rank.

    It has to be importable (it is pickled by name) and return plain data: tensors die with their process, numpy arrays
    do not. The first process that fails takes the others with it.
    """
    config = LaunchConfig(
        1,
        1,
        ranks,
        run_id="here",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    results = elastic_launch(config, _in_group)(function, *args)
    return [results[rank] for rank in range(ranks)]


def _in_group(function, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
