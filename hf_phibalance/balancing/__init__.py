"""
Balancing: counts the tokens of a patched model, moves its means, prices and biases, and adds the gradient of its routers. Knows
optimizer steps, not trainers.

1. `forwards` opens a forward of the backbone with its token mask (`tokens`).
2. Each router adds its probabilities and selections to the `counts` of the forward.
3. In the backward, `step` sets the weight 1/N of each token, and `gradient` adds coef · q to the router's gradient.
4. After the optimizer step (`process`), the counts of all ranks move the means. The means give the prices and biases (`duals`).

| module | what it holds |
|---|---|
| `patching` | patches a model, and takes the patch out |
| `balancer` | the object of a patched model |
| `forwards` | which forwards count and which get the auxiliary gradient; what the routers do in them |
| `tokens` | which tokens of a forward count |
| `counts` | sums over tokens |
| `loop` | the training loop: announces, ends and gives up steps; warns of silent failures |
| `step` | an optimizer step, its forwards, and the weight of a token |
| `gradient`, `compiled` | the auxiliary gradient; the same under `torch.compile` |
| `duals` | means, prices and biases, and how a step moves them |
| `process` | hooks and wrappers set in the whole process; private names of torch |
| `ranks` | the ranks that share a step |
| `adapters` | which PEFT adapter is switched on |
| `state` | the file next to the weights |
| `refusals` | what cannot be balanced |
| `learning` | which routers learn, and which parameters the balancing gradient reaches |
| `built_in_loss`, `undo` | switches off the model's own auxiliary loss; changes that can be undone |
"""

from .adapters import refuse_virtual_tokens, virtual_tokens
from .ascent import Ascent
from .balancer import PhiBalancer
from .built_in_loss import announce_switched_off
from .calibration import calibrate
from .duals import LOGIT_WIDTH
from .figures import Figures
from .gradient import auxiliary_gradient
from .learning import LearningReport, describe_router
from .observation import Batch, Look, Measurement, evaluating, looking, repeatable
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
from .precision import warn_of_rounded_routers
from .process import on_train
from .random_state import RandomState
from .state import StateFile, check_model, config_in, fingerprint, read_state
from .tokens import count_mask, count_padding


__all__ = [
    "LOGIT_WIDTH",
    "Ascent",
    "Batch",
    "Figures",
    "LearningReport",
    "Look",
    "Measurement",
    "PhiBalancer",
    "RandomState",
    "StateFile",
    "announce_switched_off",
    "auxiliary_gradient",
    "calibrate",
    "check_model",
    "config_in",
    "count_mask",
    "count_padding",
    "describe_router",
    "evaluating",
    "find_balancer",
    "find_balancers",
    "fingerprint",
    "get_balancer",
    "give_own_config",
    "learning_report",
    "looking",
    "on_train",
    "patch",
    "read_state",
    "refuse_virtual_tokens",
    "repeatable",
    "unpatch",
    "virtual_tokens",
    "warn_of_rounded_routers",
    "wrap_below",
]
