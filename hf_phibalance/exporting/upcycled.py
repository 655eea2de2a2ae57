"""Writes an upcycled checkpoint tensor by tensor, so that neither model is ever in memory as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..files import find_file, flush, hub_arguments, hub_name, public_name, versions
from ..hub import CARD_NAME, as_code, markdown_table
from ..models import Difference, Upcycler, Upcycling, difference, find_adapter, load_tokenizer, made_logits
from .writing import check_destination, weight_files, whole_folder


LICENSE_FIELDS = ("license", "license_name", "license_link")  # of a model card


@dataclasses.dataclass
class UpcycleReport:
    """
    What [`upcycle_checkpoint`] did.

    Attributes:
        source (`str`): The dense checkpoint.
        model_type (`str`): Type of the MoE model.
        layers (`list[int]`): Layers with experts, from 0.
        depth (`int`): Number of layers.
        options (`Upcycling`): The options.
        parameters (`int`): Number of parameters.
        active (`int`): Number of parameters that a token uses.
        difference (`Difference`, *optional*): How much the result differs from the dense model, if it was compared.
    """

    source: str
    model_type: str
    layers: list[int]
    depth: int
    options: Upcycling
    parameters: int = 0
    active: int = 0
    difference: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain JSON values."""
        return dataclasses.asdict(self) | {"source": public_name(self.source), "versions": versions()}

    def to_markdown(self) -> str:
        """Returns the report as text, with a table of the options."""
        options, name = self.options, hub_name(self.source)
        base = f"[{name}](https://huggingface.co/{name})" if name else as_code(public_name(self.source))
        where = "each layer"
        if len(self.layers) < self.depth:
            where = f"layers {', '.join(map(str, self.layers))} of 0 to {self.depth - 1}"
        part = "copy" if options.splits == 1 else f"part, 1/{options.splits} in size,"
        text = (
            f"A {as_code(self.model_type)} with {self.parameters / 1e6:,.2f} M parameters, of which a token uses {self.active / 1e6:,.2f} M. "
            f"It was made of the dense model {base} by `phibalance upcycle`, and has not been trained since. In {where}, it has "
            f"{options.experts} experts, of which a token uses {options.top_k}. Each is a {part} of the layer's MLP. The routers are random."
        )
        rows = [[as_code(key), as_code(value)] for key, value in dataclasses.asdict(options).items()]
        compared = "It was not compared with the dense model." if self.difference is None else str(self.difference)
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
    Like [`upcycle`], from folder to folder. Needs memory for one shard and one matrix; to compare, for the embeddings and one layer. The weights are the same as those
    of [`upcycle`] with the same options.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub name of the dense model, in the safetensors format.
        destination (`str` or `os.PathLike`): A new or empty folder for the checkpoint, tokenizer and model card.
        options (`Upcycling`): The options.
        tokenizer (`str` or `os.PathLike`, *optional*): Another folder or name to take the tokenizer from.
        max_shard_gb (`float`, *optional*, defaults to 5.0): Largest size of a file of weights, in 10⁹ bytes.
        check (`bool`, *optional*, defaults to `True`):
            Whether to load both models, layer by layer, and compare their logits on random tokens. The experts need as much
            space on disk again meanwhile.
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
    report = UpcycleReport(source, upcycler.family.model_type, upcycler.layers, dense.num_hidden_layers, options)
    with whole_folder(destination) as folder:
        tensors = _made(upcycler, files, report)
        _write_shards(tensors, folder, int(max_shard_gb * 1e9))
        try:
            load_tokenizer(source, tokenizer, loading).save_pretrained(folder)
        except ValueError:
            if tokenizer is not None:
                raise
        if (generation := find_file(source, GENERATION_CONFIG_NAME, loading)) is not None:
            shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)
        upcycler.config.save_pretrained(folder)
        if check:
            report.difference = difference(_logits(source, folder, loading), _logits(folder, folder, {}))
        _write_card(report, folder, loading)
    return report


def _made(upcycler: Upcycler, files: Mapping[str, str], report: UpcycleReport) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the MoE model, and adds up their parameters in `report`."""
    active = 0.0
    for path in dict.fromkeys(files.values()):
        with safe_open(path, "pt") as file:
            for source in (name for name, holder in files.items() if holder == path):
                dense = file.get_tensor(source)
                for name, make in upcycler.tensors(source).items():
                    tensor = make(dense)
                    report.parameters += tensor.numel()
                    used = upcycler.options.top_k / upcycler.options.experts if ".experts." in name else 1
                    active += tensor.numel() * used
                    yield name, tensor
    report.active = round(active)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    """Writes `tensors` to files of at most `limit` bytes (or of one tensor), and their index."""
    shards: list[list[str]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}

    def write() -> None:
        path = folder / f"{len(shards)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        flush(path)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            write()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"{number}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _logits(source: str | os.PathLike, scratch: Path, loading: Mapping[str, Any]) -> Tensor:
    """Returns the logits of a checkpoint on random tokens. Its layers stay on disk, in `scratch` if they are converted."""
    devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    devices["model.layers"] = "disk"
    with tempfile.TemporaryDirectory(dir=scratch) as offload:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, device_map=devices, offload_folder=offload, output_loading_info=True, **hub_arguments(loading)
        )
        model, info = loaded
        if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ValueError(
                f"{wrong[0]!r} in {source} is missing or has another shape than config.json says: download it again."
            )
        return made_logits(model)


def _write_card(report: UpcycleReport, folder: Path, loading: Mapping[str, Any]) -> None:
    """Writes a model card that names the base model, and has its license."""
    card = find_file(report.source, CARD_NAME, loading)
    license = {key: value for key, value in ((card and metadata_load(card)) or {}).items() if key in LICENSE_FIELDS}
    data = ModelCardData(
        base_model=hub_name(report.source),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "upcycled", report.model_type],
        **license,
    )
    ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {as_code(folder.name.removesuffix('.partial'))}\n\n{report.to_markdown()}\n"
    ).save(folder / CARD_NAME)
