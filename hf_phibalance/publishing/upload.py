"""The upload of a φ-balanced model to the Hub: tried again where that may help, explained where it fails.

Everything is first written into a folder; a dry run stops there. The folder of an upload that fails is kept.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers.utils import logging

from ..balancing import get_balancer
from .folder import write_folder


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


logger = logging.get_logger(__name__)
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP states that may be over in a moment


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: Any = None,
    run_folder: str | os.PathLike | None = None,
    card: ModelCard | None = None,
    commit_message: str = "Upload φ-balanced model",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_retries: int = 3,
    dry_run: str | os.PathLike | None = None,
) -> CommitInfo | Path | None:
    """
    Uploads a patched model, or the adapter of one: weights, config, duals, tokenizer, model card, and of a run its
    pictures, figures and evaluations.

    ```python
    phb.push_to_hub(model, "me/my-model", tokenizer=tokenizer, run_folder="results/mine", dry_run="look-at-it-first")
    phb.push_to_hub(model, "me/my-model", tokenizer=tokenizer, run_folder="results/mine")
    ```

    Args:
        model (`torch.nn.Module`): The patched model; what wraps it (DDP, `torch.compile`) is taken off, PEFT stays.
        repo_id (`str`): The repository, `"user/name"`, made if it does not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Uploaded with the model.
        run_folder (`str` or `os.PathLike`, *optional*):
            Results folder of `recipes/sft.py`, with what `recipes/evaluate.py` put there (`eval-*.json`).
        card ([`~huggingface_hub.ModelCard`], *optional*): Instead of the one made from `model_cards/template.md`.
        commit_message (`str`, *optional*): Message of the commit.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`bool` or `str`, *optional*): Access token; the stored one unless given.
        revision (`str`, *optional*): Branch to commit to.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of committing.
        max_retries (`int`, *optional*, defaults to `3`):
            How often the upload is tried again after an answer of 5xx or a lost connection, waiting 1, 2, 4, ...
            seconds. A pull request is tried once, lest it be opened twice.
        dry_run (`str` or `os.PathLike`, *optional*):
            An empty or new folder: it receives exactly what would be uploaded, and the network is not touched.

    Returns:
        [`~huggingface_hub.CommitInfo`], or in a dry run the `Path` of the folder; `None` on ranks other than the first.

    Raises:
        ValueError: If the model is not patched or is sharded over ranks, if the Hub refuses the card's metadata, or if
            an argument is unusable.
        PermissionError: If the Hub refuses the token.
        ConnectionError: If the upload failed. It names the folder that was to be uploaded, which is kept.
    """
    validate_repo_id(repo_id)
    get_balancer(model)
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):  # a DTensor
        raise ValueError(
            "the model is sharded over ranks, so this process holds only a part of it. Save it with trainer.save_model(), "
            "load the folder in one process and push that."
        )
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return None
    if dry_run is None and constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{repo_id} cannot be uploaded while HF_HUB_OFFLINE=1. Unset it, or give dry_run=<folder> to see what would "
            "be uploaded."
        )
    if dry_run is not None:
        folder = Path(dry_run)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"dry_run={str(folder)!r} must be a new or an empty folder: it would mix with what is there."
            )
        write_folder(folder, model, repo_id, tokenizer, run_folder, card, online=False)
        return folder
    folder = Path(tempfile.mkdtemp(prefix=f"{repo_id.split('/')[-1]}-"))
    try:
        write_folder(folder, model, repo_id, tokenizer, run_folder, card, online=True, token=token)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    commit = upload(folder, repo_id, commit_message, private, token, revision, create_pr, max_retries)
    shutil.rmtree(folder)
    return commit


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str = "Upload φ-balanced model",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_retries: int = 3,
) -> CommitInfo:
    """
    Uploads `folder` as it is, for instance that of a dry run; arguments and errors are those of [`push_to_hub`]. The
    folder is never changed.
    """
    api = HfApi(token=token)
    tries = 1 if create_pr else max_retries + 1
    for attempt in range(tries):
        try:
            full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=full_name,
                folder_path=Path(folder),
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:
            if attempt + 1 == tries or not _is_transient(error):
                raise _explained(error, Path(folder), repo_id) from error
            wait = 2**attempt
            logger.warning(f"uploading to {repo_id} failed ({_reason(error)}); trying again in {wait} s.")
            time.sleep(wait)
    raise ValueError(f"max_retries must be at least 0, got {max_retries}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """HTTP status behind an error, if the Hub has answered at all."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code
    return None


def _lost_connection(error: BaseException) -> bool:
    """Whether the network failed: an error of the HTTP client, whichever module huggingface_hub takes it from."""
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    return "TransportError" in names or any(isinstance(cause, ConnectionError) for cause in _causes(error))


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    return status in TRANSIENT if status is not None else _lost_connection(error)


def _reason(error: BaseException) -> str:
    causes = list(_causes(error))
    status = _status(error)
    text = next((str(cause).strip() for cause in reversed(causes) if str(cause).strip()), type(error).__name__)
    return f"HTTP {status}" if status is not None else text.splitlines()[0]


def _explained(error: Exception, folder: Path, repo_id: str) -> Exception:
    """The error to raise: what happened, what to do, and where the files are."""
    again = f"Everything to upload is kept in {folder}; to try again: hf upload {repo_id} {folder} ."
    status = _status(error)
    if status in (401, 403):
        return PermissionError(
            f"the Hub refused to write to {repo_id} (HTTP {status}): log in with `hf auth login`, or pass a token with "
            f"write access to it. {again}"
        )
    if isinstance(error, ValueError) or (status is None and not _lost_connection(error)):  # a card or name it refuses
        return ValueError(f"{repo_id} was not uploaded: {error} {again}")
    return ConnectionError(f"uploading to {repo_id} failed ({_reason(error)}). {again}")
