"""
φ-balanced Mixture-of-Experts routers for Hugging Face transformers (arXiv 2605.15403).

```python
import hf_phibalance as phb

model = phb.AutoModelForCausalLM.from_pretrained("mistralai/Mixtral-8x7B-v0.1", phi_balance=True)
trainer = SFTTrainer(model, ...)
phb.attach(trainer)
trainer.train()
```
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .lazy import lazy_door


if TYPE_CHECKING:
    from .balancing import PhiBalancer, get_balancer, learning_report, patch, unpatch
    from .config import PhiBalanceConfig
    from .forwards import FoldReport, calibrate, fold
    from .maths import POTENTIALS
    from .methods import METHODS
    from .models import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        disable,
        enable,
    )
    from .portable import ExportReport, export
    from .publishing import push_to_hub
    from .routers import supported_families
    from .training import PhiBalanceCallback, attach, doctor, last_checkpoint, lora_config


__all__ = [
    "METHODS",
    "POTENTIALS",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "ExportReport",
    "FoldReport",
    "PhiBalanceCallback",
    "PhiBalanceConfig",
    "PhiBalancer",
    "attach",
    "calibrate",
    "disable",
    "doctor",
    "enable",
    "export",
    "fold",
    "get_balancer",
    "last_checkpoint",
    "learning_report",
    "lora_config",
    "patch",
    "push_to_hub",
    "supported_families",
    "unpatch",
]
# Where they are; imported when first asked for, so that `phibalance --help` need not wait for torch and transformers.
_ROOMS = {
    "METHODS": "methods",
    "POTENTIALS": "maths",
    "AutoModel": "models",
    "AutoModelForCausalLM": "models",
    "AutoModelForImageTextToText": "models",
    "AutoModelForQuestionAnswering": "models",
    "AutoModelForSequenceClassification": "models",
    "AutoModelForTokenClassification": "models",
    "ExportReport": "portable",
    "FoldReport": "forwards",
    "PhiBalanceCallback": "training",
    "PhiBalanceConfig": "config",
    "PhiBalancer": "balancing",
    "attach": "training",
    "calibrate": "forwards",
    "disable": "models",
    "doctor": "training",
    "enable": "models",
    "export": "portable",
    "fold": "forwards",
    "get_balancer": "balancing",
    "last_checkpoint": "training",
    "learning_report": "balancing",
    "lora_config": "training",
    "patch": "balancing",
    "push_to_hub": "publishing",
    "supported_families": "routers",
    "unpatch": "balancing",
}
_get_public, __dir__ = lazy_door(globals(), _ROOMS)


def __getattr__(name: str) -> Any:
    """A public name, or a room: `phb.inspection` needs no import of its own."""
    if name not in _ROOMS and not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    return _get_public(name)
