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

from .auto import AutoModelForCausalLM, disable, enable
from .balancer import PhiBalancer
from .callback import PhiBalanceCallback, attach
from .config import PhiBalanceConfig
from .hub import push_to_hub
from .lora import lora_config
from .methods import METHODS
from .patching import get_balancer, learning_report, patch, unpatch
from .potentials import POTENTIALS
from .routers import supported_families


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
