"""
Runs `recipes/sft.py` several times in the processes that `accelerate launch` started: one list of options each, as JSON.

accelerate runs FSDP and DeepSpeed on accelerators only. To try them on the CPU, this script makes accelerate believe
that the CPU is an accelerator.
"""

import json
import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from paths import ROOT


def pretend_accelerator():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # CPU kernels, which take minutes to compile


if __name__ == "__main__":
    torch.set_num_threads(1)
    if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
        pretend_accelerator()
    sys.path.insert(0, str(ROOT / "recipes"))
    import sft

    from hf_phibalance.hub import pictures

    pictures.plot_loads = pictures.plot_curves = lambda *args, **kwargs: None  # they take longer than the training
    for options in sys.argv[1:]:
        sft.main(*sft.parse(json.loads(options)))
