"""Writes an upcycled checkpoint tensor by tensor, so that neither model is ever in memory as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from ..files import find_file, hub_arguments, hub_name, public_name, quoted, versions
from ..hub import CARD_NAME, as_code, markdown_table
from ..models import (
    Difference,
    Upcycler,
    Upcycling,
    check_whole,
    difference,
    find_adapter,
    made_logits,
    open_weights,
)
from .writing import UNFINISHED, check_destination, find_tokenizer, weight_files, whole_folder


logger = logging.get_logger(__name__)
LICENSE_FIELDS = ("license", "license_name", "license_link")  # of a model card


@dataclasses.dataclass
class UpcycleReport:
    """
    What [`upcycle_checkpoint`] did.

    Attributes:
        source (`str`): The dense checkpoint.
        model_type (`str`): Type of the MoE model.
        layers (`list[int]`): Layers with experts, from 0.
        options (`Upcycling`): The options.
        parameters (`int`): Number of parameters.
        active (`int`): Number of parameters that a token uses.
        difference (`Difference`, *optional*): How much the result differs from the dense model, if it was compared.
    """

    source: str
    model_type: str
    layers: list[int]
    options: Upcycling
    parameters: int
    active: int
    difference: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain JSON values."""
        return dataclasses.asdict(self) | {"source": public_name(self.source), "versions": versions()}

    def to_markdown(self) -> str:
        """Returns the report as text, with a table of the options."""
        options, name = self.options, hub_name(self.source)
        base = f"[{name}](https://huggingface.co/{name})" if name else as_code(public_name(self.source))
        expert = "a copy" if options.splits == 1 else f"1/{options.splits}"
        text = (
            f"A {as_code(self.model_type)} with {self.parameters / 1e6:,.2f} M parameters, of which a token uses "
            f"{self.active / 1e6:,.2f} M. `phibalance upcycle` made it of the dense model {base}. It has not been trained since. "
            f"{len(self.layers)} layers have {options.experts} experts each, and a token uses {options.top_k} of them. An expert is "
            f"{expert} of the layer's MLP. The routers are random."
        )
        rows = [[as_code(key), as_code(value)] for key, value in dataclasses.asdict(options).items()]
        compared = self.difference or "It was not compared with the dense model."
        return f"{text}\n\n{markdown_table(['option', 'value'], rows)}\n\n{compared}"


def upcycle_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    options: Upcycling,
    *,
    tokenizer: str | os.PathLike | None = None,
    max_shard_gb: float = 5.0,
    check: bool = True,
    **loading: Any,
) -> UpcycleReport:
    """
    Like [`upcycle`] from folder to folder, with the same weights. Needs memory for one file of weights and one matrix, and for
    the comparison the embeddings and one layer.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub name of the dense model, in the safetensors format.
        destination (`str` or `os.PathLike`): A new or empty folder for the checkpoint, tokenizer and model card.
        options (`Upcycling`): The options.
        tokenizer (`str` or `os.PathLike`, *optional*): Another folder or name to take the tokenizer from.
        max_shard_gb (`float`, *optional*, defaults to 5.0): Largest size of a file of weights, in 10⁹ bytes.
        check (`bool`, *optional*, defaults to `True`):
            Whether to load both models, layer by layer, and compare their logits on random tokens. Meanwhile the experts
            need their space on disk twice.
        loading: Arguments of `from_pretrained` that say where `source` is on the Hub, for example `revision`.

    Returns:
        `UpcycleReport`: What was done.

    Raises:
        ValueError: If the source cannot be upcycled, an option is wrong, or `destination` is not empty.
    """
    source, destination = str(source), Path(destination)
    check_destination(destination)
    if not max_shard_gb > 0:
        raise ValueError(f"`max_shard_gb` must be more than 0, got {max_shard_gb}.")
    if find_adapter(source, loading) is not None:
        raise ValueError(
            f"{source} is an adapter, or has one in its folder. Merge it (`merge_and_unload`) and save the result."
        )
    dense = transformers.AutoConfig.from_pretrained(source, **hub_arguments(loading))
    upcycler = Upcycler(dense, (dense.architectures or [""])[0], options)
    files = weight_files(source, loading)
    upcycler.check_names(files)
    tokens = find_tokenizer(source, tokenizer, loading)
    with whole_folder(destination) as folder:
        shared, experts = _write_weights(upcycler, files, folder, int(max_shard_gb * 1e9))
        upcycler.config.save_pretrained(folder)
        if tokens is not None:
            tokens.save_pretrained(folder)
        if (generation := find_file(source, GENERATION_CONFIG_NAME, loading)) is not None:
            shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)
        active = shared + experts * options.top_k // options.experts
        report = UpcycleReport(source, upcycler.family.model_type, upcycler.layers, options, shared + experts, active)
        if check:
            report.difference = difference(_logits(source, folder, loading), _logits(folder, folder, {}))
        _write_card(report, folder, loading)
    return report


def _write_weights(upcycler: Upcycler, files: Mapping[str, str], folder: Path, limit: int) -> tuple[int, int]:
    """Writes the weights and their index. Returns the number of parameters outside the experts, and inside."""
    weight_map: dict[str, str] = {}
    shared = experts = size = 0
    for number, shard in enumerate(_shards(_converted(upcycler, files), limit), 1):
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        for name, tensor in shard.items():
            weight_map[name] = file
            size += tensor.nbytes
            if ".experts." in name:
                experts += tensor.numel()
            else:
                shared += tensor.numel()
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return shared, experts


def _converted(upcycler: Upcycler, files: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the MoE model. `files` are the dense tensors' names and the files that hold them."""
    for path in dict.fromkeys(files.values()):
        with open_weights(path) as file:
            for name in (name for name, holder in files.items() if holder == path):
                yield from upcycler.convert(name, file.get_tensor(name))


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors in groups of at most `limit` bytes, or of one tensor. A group is emptied when the next one is asked for."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard.clear()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _logits(source: str | os.PathLike, scratch: Path, loading: Mapping[str, Any]) -> Tensor:
    """Returns the logits of a checkpoint on random tokens. Its layers stay on disk, in `scratch` if they are converted."""
    devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    devices["model.layers"] = "disk"
    with tempfile.TemporaryDirectory(dir=scratch) as offload:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, device_map=devices, offload_folder=offload, output_loading_info=True, **hub_arguments(loading)
        )
        model, info = loaded
        check_whole(info, str(source))
        return made_logits(model)


def _write_card(report: UpcycleReport, folder: Path, loading: Mapping[str, Any]) -> None:
    """Writes a model card that names the base model, and has its license."""
    card = find_file(report.source, CARD_NAME, loading)
    try:
        fields = (card and metadata_load(card)) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(f"{card} cannot be read ({quoted(str(error))}), so the new card names no license.")
        fields = {}
    license = {key: value for key, value in fields.items() if key in LICENSE_FIELDS}
    data = ModelCardData(
        base_model=hub_name(report.source),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "upcycled", report.model_type],
        **license,
    )
    title = as_code(folder.name.removeprefix(".").removesuffix(UNFINISHED))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{report.to_markdown()}\n").save(folder / CARD_NAME)
