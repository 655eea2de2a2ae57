"""
Balancing: what a patched model counts, how its means, prices and biases move, and the gradient that its routers get. Knows
optimizer steps, not trainers.

The way of a token: `forwards` opens a forward of the backbone with its token mask (`tokens`); each router's probabilities and
selection enter its `counts`; when its backward comes, `step` sets the token's weight 1/N and `gradient` adds coef · q to the
router's gradient; when the optimizer has stepped (`process`), the counts of all ranks move the means, and these the prices and
biases (`duals`).

| module | what it holds |
|---|---|
| `patching` | putting all this into a model, and taking it out |
| `balancer` | the object of a patched model |
| `forwards` | which forwards count and which get the auxiliary gradient; what the routers do in them |
| `tokens` | which tokens of a forward count |
| `counts` | sums over tokens |
| `loop` | the training loop: steps announced, ended and given up; what would stay silent |
| `step` | an optimizer step, its forwards, and what a token weighs |
| `gradient`, `compiled` | the auxiliary gradient; the same under `torch.compile` |
| `duals` | means, prices and biases, and how a step moves them |
| `process` | all that is set in the process; private names of torch |
| `ranks` | who shares a step |
| `adapters` | which adapter of PEFT is switched on |
| `state` | the file beside the weights |
| `refusals` | what cannot be balanced |
| `learning` | which routers learn, and what balancing can move |
| `built_in_loss`, `undo` | the auxiliary loss that is off meanwhile; changes that can be taken back |
"""

from .adapters import virtual_tokens
from .balancer import PhiBalancer
from .built_in_loss import announce_switched_off
from .duals import LOGIT_WIDTH
from .gradient import auxiliary_gradient
from .learning import LearningReport, describe_router
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
from .random_state import RandomState
from .state import StateFile, check_model, config_in, fingerprint, read_state
from .tokens import count_mask


__all__ = [
    "LOGIT_WIDTH",
    "LearningReport",
    "PhiBalancer",
    "RandomState",
    "StateFile",
    "announce_switched_off",
    "auxiliary_gradient",
    "check_model",
    "config_in",
    "count_mask",
    "describe_router",
    "find_balancer",
    "find_balancers",
    "fingerprint",
    "get_balancer",
    "give_own_config",
    "learning_report",
    "on_train",
    "patch",
    "read_state",
    "unpatch",
    "virtual_tokens",
    "wrap_below",
]
