"""
ms-swift: `swift sft ... --external_plugins plugin.py --callbacks phi_balance`, with this `plugin.py`:

```python
from hf_phibalance.integrations import swift

swift.register(coef=0.01)
```

`swift.register(watch=True)` watches the routers ([`watch`]) without balancing them, `swift.register(watch=True, coef=0.01)` does both.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from swift.callbacks import callbacks_map

from ..balancing import patch
from ..config import PhiBalanceConfig
from ..training import PhiBalanceCallback, attach, watch


NAME = "phi_balance"


def register(*, watch: bool = False, **fields: Any) -> None:
    """
    Makes `--callbacks phi_balance` known to ms-swift.

    Args:
        watch (`bool`, *optional*, defaults to `False`): whether to watch the routers; without `fields`, nothing is balanced.
        fields: those of [`PhiBalanceConfig`], which checks them.
    """
    config = PhiBalanceConfig.from_dict({"method": "none"} if watch and not fields else fields)
    callbacks_map[NAME] = functools.partial(SwiftCallback, config, watch)


class SwiftCallback(PhiBalanceCallback):
    """Patches and attaches in `on_init_end`, since ms-swift makes a trainer's callbacks before its model is there."""

    def __init__(self, config: PhiBalanceConfig, is_watched: bool, args: Any, trainer: Any) -> None:
        super().__init__()
        if config.is_on and args.router_aux_loss_coef:
            raise ValueError(
                f"--router_aux_loss_coef {args.router_aux_loss_coef} adds a second auxiliary loss to φ-balancing. Leave "
                f"it out, or leave out --callbacks {NAME}."
            )
        if trainer.template.sequence_parallel_size > 1:
            raise ValueError(
                f"--sequence_parallel_size {trainer.template.sequence_parallel_size} splits a sequence over ranks, whose "
                "tokens are then counted as if they were different sequences'. Set --sequence_parallel_size 1."
            )
        self.config, self.is_watched = config, is_watched
        self.trainer = trainer

    def on_init_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
        if dist.is_initialized() and dist.get_world_size() != args.world_size:
            raise RuntimeError(
                f"{dist.get_world_size()} processes would train without exchanging gradients: transformers takes each for the "
                "only one, as it does on a CPU unless told so. Set --use_cpu true there."
            )
        patch(self.trainer.model, self.config)
        attach(self.trainer)
        if self.is_watched:
            watch(self.trainer)
