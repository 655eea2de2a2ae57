"""
Uses the installed package without its checkout: `python installed.py FOLDER`. Saves a tiny model, runs `phibalance
doctor` on it, and writes its model card. Needs only the declared dependencies.
"""

import subprocess
import sys
from pathlib import Path

from transformers import MixtralConfig, MixtralForCausalLM

import hf_phibalance as phb
from hf_phibalance.models import train_tokenizer


def main(folder: Path) -> None:
    assert Path(sys.prefix) in Path(phb.__file__).parents, f"{phb.__file__} is not the installed package"
    tokenizer = train_tokenizer([f"{a} + {b} = {a + b}" for a in range(30) for b in range(30)], vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = phb.patch(MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)), {"coef": 0.01})
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = Path(sys.executable).with_name("phibalance")
    subprocess.run([command, "doctor", folder / "model", "--strict"], check=True)
    phb.push_to_hub(model, "me/tiny", tokenizer=tokenizer, dry_run=folder / "upload")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
