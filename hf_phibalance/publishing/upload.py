"""A φ-balanced model on the Hub: the folder that is uploaded, its upload, and what `Trainer(push_to_hub=True)` lacks.

Everything is first written into a folder; a dry run stops there. The folder of an upload that fails is kept.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..balancing.duals import STATE_NAME
from ..balancing.patching import _unwrap, find_patch, get_balancer
from . import report


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


logger = logging.get_logger(__name__)
CARD_NAME = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
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


# ---------------------------------------------------------------------- the folder


def write_folder(
    folder: Path,
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    run_folder: str | os.PathLike | None = None,
    card: ModelCard | None = None,
    online: bool = False,
    token: bool | str | None = None,
) -> None:
    """Writes what is uploaded; with `online`, a licence that is not at hand is looked up on the Hub."""
    run, baseline = _load_run(model, run_folder)
    saved: Any = next(part for part in _unwrap(model) if hasattr(type(part), "save_pretrained"))
    adapter = _adapter_config(saved)
    if card is None:
        base_model = _base_model(saved, run)
        card = report.model_card(
            run,
            baseline,
            title=repo_id.split("/")[-1],
            base_model=base_model,
            licence=base_licence(base_model, online, token) if base_model else None,
            library_name="transformers" if adapter is None else "peft",
            repo_id=repo_id,
            pictures=report.pictures_in(run_folder) if run_folder else (),
        )
    folder.mkdir(parents=True, exist_ok=True)
    # PEFT would ask the Hub whether the vocabulary has grown
    saved.save_pretrained(folder, **({} if adapter is None else {"save_embedding_layers": _embeddings_changed(saved)}))
    _sort_metadata(folder / STATE_NAME)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if run_folder is not None:
        for name in (report.SUMMARY_NAME, *report.pictures_in(run_folder)):
            shutil.copyfile(Path(run_folder) / name, folder / name)
        for name, text in report.eval_result_files(run).items():
            (folder / report.EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
            (folder / report.EVAL_RESULTS_FOLDER / name).write_text(text)
    card.save(folder / CARD_NAME)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, whose order is random, so that the same state is the same file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(content[:8] + text.ljust(size) + content[8 + size :])


def _load_run(model: nn.Module, run_folder: str | os.PathLike | None) -> tuple[report.Run, report.Run | None]:
    if run_folder is not None:
        return report.Run.load(run_folder), report.Run.load_baseline(run_folder)
    balancer = get_balancer(model)
    root: Any = balancer.root
    summary = {
        "model_type": root.config.model_type,
        "parameters": sum(parameter.numel() for parameter in root.parameters()),
        "steps": balancer.steps,
        "balance": balancer.config.to_dict() if balancer.config.is_on else None,
        "versions": report.versions(),
    }
    return report.Run(summary, [], []), None


def _adapter_config(model: Any) -> Any:
    """The PEFT config of an adapter, or `None`."""
    configs = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    return configs[model.active_adapter] if configs else None


def _base_model(model: Any, run: report.Run) -> str | None:
    """What was fine-tuned, as a name on the Hub or a local folder; `None` for a model trained from scratch."""
    adapter = _adapter_config(model)
    if adapter is not None and adapter.base_model_name_or_path:
        return adapter.base_model_name_or_path
    if "base_model" in run.summary:
        return run.summary["base_model"]
    return getattr(model.config, "_name_or_path", None) or None


def _embeddings_changed(model: Any) -> bool:
    """Whether an adapter has to carry the embeddings: they are trained, or have other rows than the base model's."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    adapter, base = _adapter_config(model), model.get_base_model()
    targets = getattr(adapter, "target_modules", None) or ()
    if isinstance(targets, str):
        names = [name for name, _ in base.named_modules() if re.fullmatch(targets, name)]
    else:
        names = list(targets)
    if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names):
        return getattr(adapter, "trainable_token_indices", None) is None
    try:
        original = AutoConfig.from_pretrained(adapter.base_model_name_or_path, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return False
    return original.get_text_config().vocab_size != base.config.get_text_config().vocab_size


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
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    return {key: data.get(key) for key in LICENCE_KEYS if isinstance(data.get(key), str)}


# ---------------------------------------------------------------------- the upload


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


# ---------------------------------------------------------------------- Trainer


class _UploadCallback(TrainerCallback):
    """Puts the duals where `Trainer` uploads from: of a checkpoint it copies there only the files it knows."""

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        present = find_patch(model)
        if present is not None and state.is_world_process_zero:
            present.balancer.save(str(args.output_dir))


def complete_uploads(trainer: Trainer, history: list[dict[str, Any]] | None = None) -> None:
    """
    Lets `Trainer(push_to_hub=True)` and `trainer.push_to_hub()` upload the duals at every push, and say in the card how
    the model was balanced. A card that [`push_to_hub`] or a recipe's report wrote is kept instead of the trainer's draft.
    [`attach`] calls it; calling it again does nothing.

    Args:
        trainer (`transformers.Trainer`): The trainer.
        history (`list[dict]`, *optional*): The `history` of the [`PhiBalanceCallback`].
    """
    if any(isinstance(callback, _UploadCallback) for callback in trainer.callback_handler.callbacks):
        return
    trainer.add_callback(_UploadCallback())
    create: Any = trainer.create_model_card

    @functools.wraps(create)
    def create_with_balance(*args, **kwargs):
        path = Path(str(trainer.args.output_dir)) / CARD_NAME
        is_writer = trainer.is_world_process_zero()
        ours = path.read_text(encoding="utf-8") if is_writer and path.is_file() else ""
        create(*args, **kwargs)
        present = find_patch(trainer.model)  # type: ignore[arg-type]
        if not is_writer or present is None or not path.is_file():
            return
        if report.CARD_MARK in ours:
            path.write_text(ours, encoding="utf-8")
        else:
            _extend_card(path, report.Run.of(trainer, present.balancer.config, history or []))

    trainer.create_model_card = create_with_balance  # type: ignore[method-assign]


def _extend_card(path: Path, run: report.Run) -> None:
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *report.tags(run.summary["balance"])]))
    card.text = f"{card.text.rstrip()}\n\n{report.balance_section(run)}"
    card.save(path)
