"""
Balancing: counts the tokens of a patched model, moves its means, prices and biases, and adds the gradient of its routers. Knows
optimizer steps, not trainers.

1. `forwards` opens a forward of the backbone with its token mask (`tokens`).
2. Each router adds its probabilities and selections to the `counts` of the forward.
3. In the backward, `step` sets the weight 1/N of each token, and `gradient` adds coef · q to the router's gradient.
4. After the optimizer step (`process`), the `loop` sums the counts over all ranks. They move the means, which give the prices
   and biases (`duals`).

| module | what it holds |
|---|---|
| `patching`, `changes` | patches a model, and takes the patch out; changes that can be undone |
| `balancer` | the object of a patched model |
| `forwards` | which forwards count and which get the auxiliary gradient; what the routers do in them |
| `tokens`, `counts` | which tokens of a forward count; sums over them, and metrics |
| `gradient` | the auxiliary gradient, also under `torch.compile` |
| `step` | an optimizer step, its forwards, and the weight of a token |
| `loop` | the training loop: announces, ends and gives up steps; warns of silent failures |
| `duals` | means, prices and biases, and how a step moves them |
| `process` | hooks and wrappers set in the whole process; private names of torch |
| `state`, `saving` | the file next to the weights; writes it with them, and with adapters |
| `checks` | what cannot be balanced; which routers learn |
| `observation` | forwards that leave no trace; calibration by them |
"""

# ruff: noqa: F401

from . import saving  # registers its wrappers
from .balancer import PhiBalancer
from .changes import announce_switched_off
from .checks import describe_router, warn_of_rounded_routers
from .counts import Counts, Figures
from .gradient import auxiliary_gradient
from .observation import (
    Ascent,
    Batch,
    Measurement,
    Observation,
    RandomState,
    calibrate,
    evaluating,
    observing,
    repeatable,
)
from .patching import (
    find_balancer,
    find_balancers,
    get_balancer,
    give_own_config,
    learning_report,
    patch,
    unpatch,
    wrap_below,
)
from .process import on_train
from .state import StateFile, check_model, fingerprint, read_state
from .tokens import count_padding, refuse_virtual_tokens
