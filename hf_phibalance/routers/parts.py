"""Routers that see only a part of the tokens, or none of them: experts for images beside those for text, vision towers.

Shapes: T tokens of a forward, B rows, S positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .discovery import RouterSite


OTHER_MODALITIES = re.compile(r"(?:^|[._])(vision|visual|image|audio)(?:[._]|$)")


def modality_of(name: str) -> str:
    """What the module called `name` is for: `"vision"` or `"audio"`, where a part of its name says so, else `"text"`."""
    found = OTHER_MODALITIES.search(name)
    return "text" if found is None else "audio" if found[1] == "audio" else "vision"


def image_tokens(inputs: Mapping[str, Any], sites: Iterable[RouterSite]) -> Tensor | None:
    """
    Which tokens of a forward with these `inputs` go to the routers for images, `(T,)` as booleans; `None` if all go to those
    for text, in models without such routers too.
    """
    for name in {site.kind.traits.parted_by for site in sites} - {None}:
        modality_BS = inputs.get(str(name))
        if isinstance(modality_BS, Tensor):
            return modality_BS.reshape(-1) != 0
    return None


def mask_of(site: RouterSite, mask_T: Tensor, image_T: Tensor | None, routed: int) -> Tensor:
    """
    `mask_T` of the `routed` vectors that reach router `site`: of all tokens, or of those in `image_T` or the others. In a tower
    it is of patches, which are never padding.
    """
    if site.in_tower:
        return torch.ones(routed, dtype=mask_T.dtype, device=mask_T.device)
    if site.kind.traits.parted_by is None or image_T is None:
        return mask_T
    image_T = image_T.to(mask_T.device)
    return mask_T[image_T if site.modality != "text" else ~image_T]
