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

import lazy_loader


# `__init__.pyi` lists the public names. They are imported at first use: `phibalance --help` does not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
