"""
Loads a checkpoint without this package, in a process of its own:
`python alone.py FOLDER AUTO_CLASS EXAMPLE DEVICE_MAP TRUST_REMOTE_CODE`. EXAMPLE is a safetensors file with inputs
and the expected `logits`. Prints what it found as one line of JSON. Warnings go to stderr.
"""

import json
import sys


def main(folder: str, auto_class: str, example: str, device_map: str, trust_remote_code: str) -> None:
    del sys.path[0]  # the folder of this file
    sys.modules["hf_phibalance"] = None  # type: ignore[assignment]  # importing it fails

    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    model, info = getattr(transformers, auto_class).from_pretrained(
        folder,
        dtype="auto",
        device_map=device_map or None,
        trust_remote_code=trust_remote_code == "True",
        output_loading_info=True,
    )
    inputs = load_file(example)
    expected = inputs.pop("logits").float()
    with torch.no_grad():
        logits = model.eval()(**{name: part.to(model.device) for name, part in inputs.items()}).logits.float().cpu()
    difference = logits - expected
    if difference.ndim == 3:  # logits of each token, including padding
        difference = difference[inputs["attention_mask"].bool()]
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found: dict[str, object] = {kind: sorted(map(str, info.get(kind) or ())) for kind in kinds}
    found |= {"logits_differ_by": float(difference.abs().max()), "class": type(model).__name__}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
