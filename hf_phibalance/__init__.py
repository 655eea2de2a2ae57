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


if TYPE_CHECKING:
    from .balancing.balancer import PhiBalancer
    from .balancing.patching import get_balancer, learning_report, patch, unpatch
    from .config import PhiBalanceConfig
    from .maths.potentials import POTENTIALS
    from .methods import METHODS
    from .models.auto import AutoModelForCausalLM, disable, enable
    from .publishing.upload import push_to_hub
    from .routers.discovery import supported_families
    from .training.adapters import lora_config
    from .training.callback import PhiBalanceCallback, attach


__all__ = [
    "METHODS",
    "POTENTIALS",
    "AutoModelForCausalLM",
    "PhiBalanceCallback",
    "PhiBalanceConfig",
    "PhiBalancer",
    "attach",
    "disable",
    "enable",
    "get_balancer",
    "learning_report",
    "lora_config",
    "patch",
    "push_to_hub",
    "supported_families",
    "unpatch",
]
# Where they are; imported when first asked for, so that `phibalance --help` need not wait for torch and transformers.
_MODULES = {
    "METHODS": "methods",
    "POTENTIALS": "maths.potentials",
    "AutoModelForCausalLM": "models.auto",
    "PhiBalanceCallback": "training.callback",
    "PhiBalanceConfig": "config",
    "PhiBalancer": "balancing.balancer",
    "attach": "training.callback",
    "disable": "models.auto",
    "enable": "models.auto",
    "get_balancer": "balancing.patching",
    "learning_report": "balancing.patching",
    "lora_config": "training.adapters",
    "patch": "balancing.patching",
    "push_to_hub": "publishing.upload",
    "supported_families": "routers.discovery",
    "unpatch": "balancing.patching",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
