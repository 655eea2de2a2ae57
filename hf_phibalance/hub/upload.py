"""
Uploads a balanced model to the Hub: writes a folder, checks that nothing in it is private, and sends it. Adds a section
to the card of `Trainer(push_to_hub=True)`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers.utils import logging

from ..balancing import find_balancer, get_balancer
from ..files import hub_name
from ..routers import unwrap
from .card import CARD_MARK, CARD_NAME, balance_section, model_card, tags
from .pictures import pictures_in
from .run import SUMMARY_NAME, Run, described, has_own_bias, own_file


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import Trainer


logger = logging.get_logger(__name__)
SECRETS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{20}",
    "a private key": rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-",
    "an Amazon key": rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": rb"\b(gh[opsur]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{36})",
    "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20}",
    "a Google key": rb"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{20}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32}",  # OpenAI, Anthropic and others
    "a Weights & Biases key": rb"\bwandb_v1_[A-Za-z0-9_]{32}",
}


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
    dry_run: str | os.PathLike | None = None,
) -> CommitInfo | Path | None:
    """
    Uploads a patched model or its adapter: weights, config, state, tokenizer and model card. With `run_folder`, also
    uploads the figures and pictures of the run. `huggingface_hub` retries after temporary failures.

    ```python
    phb.push_to_hub(model, "me/my-model", tokenizer=tokenizer, run_folder="results/mine", dry_run="look-at-it-first")
    phb.push_to_hub(model, "me/my-model", tokenizer=tokenizer, run_folder="results/mine")
    ```

    Args:
        model (`torch.nn.Module`): the patched model. Wrappers of DDP and `torch.compile` are removed, PEFT stays.
        repo_id (`str`): the repository, `"user/name"`. It is created if it does not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): uploaded with the model.
        run_folder (`str` or `os.PathLike`, *optional*): results folder of `recipes/sft.py` and `recipes/evaluate.py`.
        card ([`~huggingface_hub.ModelCard`], *optional*): a card of your own, instead of the one made here.
        commit_message (`str`, *optional*): message of the commit.
        private (`bool`, *optional*): whether a new repository is private.
        token (`bool` or `str`, *optional*): access token. The default is the stored one.
        revision (`str`, *optional*): branch to commit to.
        create_pr (`bool`, *optional*, defaults to `False`): whether to open a pull request instead of committing.
        dry_run (`str` or `os.PathLike`, *optional*):
            A new or empty folder. Writes the files there instead of uploading them.

    Returns:
        [`~huggingface_hub.CommitInfo`], or in a dry run the `Path` of the folder; `None` on all ranks but the first.

    Raises:
        ValueError: if the model is not patched or is sharded over ranks, if a file of the run is a link or damaged, if
            a file holds a token or a key, or if an argument is unusable.
        RuntimeError: if the upload failed. The message names the folder, which is kept.
    """
    validate_repo_id(repo_id)
    get_balancer(model)
    # FSDP2 parameters are DTensors with a `device_mesh`; DeepSpeed keeps the full shape in `ds_shape`
    if any(hasattr(p, part) for p in model.parameters() for part in ("device_mesh", "ds_shape")):
        raise ValueError(
            "the model is sharded over ranks, so this process holds only a part of it. Save it with trainer.save_model(), "
            "load the folder in one process and push that."
        )
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return None
    if dry_run is None and constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo_id} cannot be uploaded while HF_HUB_OFFLINE=1. Unset it, or give dry_run=<folder>.")
    folder = Path(dry_run or tempfile.mkdtemp(prefix=f"{repo_id.split('/')[-1]}-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"dry_run={str(folder)!r} must be a new or an empty folder.")
    try:
        _write_folder(folder, model, repo_id, tokenizer, run_folder, card)
        _refuse_private(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if dry_run is not None:
        return folder
    try:
        api = HfApi(token=token)
        commit = api.upload_folder(
            repo_id=api.create_repo(repo_id, private=private, exist_ok=True).repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:
        options = " --private" * bool(private) + " --create-pr" * create_pr
        options += f" --revision {revision}" if revision else ""
        raise RuntimeError(
            f"{repo_id} was not uploaded: {error}\nEverything is kept in {folder}. To try again: hf upload {repo_id} {folder} .{options}"
        ) from error
    shutil.rmtree(folder)
    return commit


def _write_folder(
    folder: Path,
    model: nn.Module,
    repo_id: str,
    tokenizer: Any,
    run_folder: str | os.PathLike | None,
    card: ModelCard | None,
) -> None:
    saved: Any = next(part for part in unwrap(model) if hasattr(type(part), "save_pretrained"))
    adapters = getattr(saved, "peft_config", None) if hasattr(saved, "get_base_model") else None
    base_model = adapters[saved.active_adapter].base_model_name_or_path if adapters else None
    run = Run.load(run_folder) if run_folder else _run_without_folder(model)
    run.own_bias = has_own_bias(model)
    pictures = {name: _picture(Path(run_folder, name)) for name in pictures_in(run_folder)} if run_folder else {}
    if card is None:
        card = model_card(
            run,
            Run.load_baseline(run_folder) if run_folder else None,
            title=repo_id.split("/")[-1],
            base_model=base_model,
            library_name="peft" if adapters else "transformers",
            repo_id=repo_id,
            pictures=[*pictures],
        )
    saved.save_pretrained(folder)
    if base_model and not hub_name(base_model):
        logger.warning(
            f"The base {base_model} is a folder of this machine: adapter_config.json is uploaded without it."
        )
        for path in folder.rglob("adapter_config.json"):
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, "base_model_name_or_path": None}, indent=2))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if run_folder:
        (folder / SUMMARY_NAME).write_text(run.summary())
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    card.save(folder / CARD_NAME)


def _run_without_folder(model: nn.Module) -> Run:
    """Returns a run with what the model itself tells."""
    balancer = get_balancer(model)
    root: Any = balancer.root
    return Run(
        **described(root),
        parameters=sum(parameter.numel() for parameter in root.parameters()),
        steps=balancer.steps,
        balance=balancer.config if balancer.config.is_on else None,
        base_model=hub_name(getattr(root.config, "_name_or_path", None)),
    )


def _picture(path: Path) -> bytes:
    """Returns the content of a PNG file. Raises `ValueError` if it is a link or not a PNG."""
    content = own_file(path).read_bytes()
    if not (content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")):
        raise ValueError(f"{path} is no PNG picture. Draw it again, or remove it.")
    return content


def _refuse_private(folder: Path) -> None:
    """Raises `ValueError` if `folder` contains a link, or a token or a key in a file other than weights."""
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        content = b"" if own_file(path).suffix == ".safetensors" else path.read_bytes()
        for what, pattern in SECRETS.items():
            if found := re.search(pattern, content):
                line = content.count(b"\n", 0, found.start()) + 1
                raise ValueError(
                    f"{path.relative_to(folder)}, line {line}, holds what looks like {what} ({found[0][:7].decode()}...). "
                    "Nothing was uploaded. Remove it from its source file."
                )


def complete_card(trainer: Trainer, history: list[dict[str, Any]], create: Callable[[], None]) -> None:
    """
    Lets `create` write the card of a `Trainer`, and adds a section about expert balance, from the `history` of the
    [`PhiBalanceCallback`]. Keeps a card that [`push_to_hub`] or a recipe wrote.
    """
    path = Path(str(trainer.args.output_dir), CARD_NAME)
    is_writer = trainer.is_world_process_zero()
    before = path.read_text(encoding="utf-8", errors="replace") if is_writer and path.is_file() else ""
    create()
    balancer = find_balancer(trainer.model)  # type: ignore[arg-type]
    if not is_writer or balancer is None or not balancer.is_saved or not path.is_file():
        return
    if CARD_MARK in before:
        path.write_text(before, encoding="utf-8")
        return
    run = Run.of(trainer, balancer.config, history)
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags(run)]))
    card.text = f"{card.text.rstrip()}\n\n{balance_section(run)}"
    card.save(path)
