"""Models and tokenizers as the options of a command say."""

from __future__ import annotations

import argparse
from typing import Any


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of the model, or the one that an option names."""
    from .. import models

    return models.load_tokenizer(args.model, args.tokenizer, loading_options(args))


def load_model(args: argparse.Namespace, phi_balance: bool | None = None, is_trainable: bool = False) -> Any:
    """The model, balanced as `phi_balance` says: as it was saved, unless given. An adapter may be trainable."""
    from ..models import load_any, register_deepseek_moe

    register_deepseek_moe()
    return load_any(args.model, phi_balance=phi_balance, is_trainable=is_trainable, **loading_options(args))


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `_add_loading` asked for, as arguments of `from_pretrained`."""
    import torch

    return {
        "dtype": args.dtype,
        "device_map": args.device_map or ("auto" if torch.accelerator.is_available() else None),
        "revision": args.revision or "main",
        "trust_remote_code": args.trust_remote_code,
    }
