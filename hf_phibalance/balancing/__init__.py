"""
Balancing: what a patched model counts, charges and moves. Knows steps, not trainers.

The way of a step: `tokens` (who counts) -> `meter` (a forward) -> `tally` (sums) -> `step` (over all ranks) -> `duals`
(means, prices, biases) -> `charging` (the next step's gradient).

| module | what it holds |
|---|---|
| `patching` | putting all this into a model, and taking it out |
| `balancer` | the object that a patched model carries |
| `tokens` | which tokens of a batch count |
| `meter` | a forward: who counts, who pays |
| `tally` | the sums over tokens |
| `step` | an optimizer step: opened, closed, given up |
| `ranks` | who shares it |
| `duals` | means, prices and biases, and how a step moves them |
| `charging` | what a router charges, and how that gets into its gradient |
| `rehearsal` | an optimizer step that is tried out and leaves no trace |
| `state` | the file beside the weights |
| `refusals` | what cannot be balanced |
| `learning` | what balancing can move in a model |
| `built_in_loss`, `undo` | the auxiliary loss that is off meanwhile; attribute changes that can be taken back |
"""

from .balancer import PhiBalancer
from .built_in_loss import announce_switched_off
from .duals import LOGIT_WIDTH
from .learning import LearningReport, describe_router
from .patching import Patch, find_patch, get_balancer, learning_report, patch, unpatch
from .rehearsal import Forward, RandomState, Rehearsal, Routed
from .state import StateFile, check_model, config_in, read_state
from .tokens import count_mask


__all__ = [
    "LOGIT_WIDTH",
    "Forward",
    "LearningReport",
    "Patch",
    "PhiBalancer",
    "RandomState",
    "Rehearsal",
    "Routed",
    "StateFile",
    "announce_switched_off",
    "check_model",
    "config_in",
    "count_mask",
    "describe_router",
    "find_patch",
    "get_balancer",
    "learning_report",
    "patch",
    "read_state",
    "unpatch",
]
