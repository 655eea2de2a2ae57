"""The licence of a base model, from its card: inherited, never invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from transformers.utils import logging
from yaml import YAMLError

from .card import CARD_NAME


logger = logging.get_logger(__name__)
LICENCE_KEYS = ("license", "license_name", "license_link")


def base_licence(base_model: str, online: bool = False, token: bool | str | None = None) -> dict[str, str]:
    """
    The licence that the card of `base_model` gives.

    Args:
        base_model (`str`): A local folder, or a name on the Hub.
        online (`bool`, *optional*, defaults to `False`): Whether the card may be fetched if it is not in the cache.
        token (`bool` or `str`, *optional*): Access token.

    Returns:
        `dict[str, str]`: `license`, `license_name` and `license_link`, as far as given; empty if there is none.
    """
    path: Any = Path(base_model) / CARD_NAME if Path(base_model).is_dir() else None
    if path is None:
        path = try_to_load_from_cache(base_model, CARD_NAME)
    if not isinstance(path, str | Path):
        if not online:
            logger.warning(
                f"the card of {base_model} is not in the local cache, so its licence is not known here; an upload looks it "
                f"up. To see it in a dry run: hf download {base_model} {CARD_NAME}"
            )
            return {}
        try:
            path = HfApi(token=token).hf_hub_download(base_model, CARD_NAME)
        except (OSError, ValueError) as error:
            logger.warning(f"the licence of {base_model} could not be looked up ({error}): the card will give none.")
            return {}
    if not Path(path).is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, YAMLError) as error:
        logger.warning(
            f"the card of {base_model} at {path} cannot be read ({error}): the new card will give no licence."
        )
        return {}
    return {key: data.get(key) for key in LICENCE_KEYS if isinstance(data.get(key), str)}
