"""Saves and restores the random number generators of this process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """A snapshot of the random number generators of this process."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._device: Any = None if accelerator is None else torch.get_device_module(accelerator)
        self._on_device = None if self._device is None else self._device.get_rng_state()

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._device is not None:
            self._device.set_rng_state(self._on_device)
