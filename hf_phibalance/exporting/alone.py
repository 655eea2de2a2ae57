"""
Loads a checkpoint as anybody would who does not have this package. Run as a script, in a process of its own:
`python -I alone.py FOLDER AUTO_CLASS EXAMPLE DEVICE_MAP TRUST_REMOTE_CODE`, where EXAMPLE is a safetensors file with inputs
and the `logits` to be expected. Prints what it found as JSON.
"""

import json
import logging
import sys
import warnings


def main(folder: str, auto_class: str, example: str, device_map: str, trust_remote_code: str) -> None:
    sys.modules["hf_phibalance"] = None  # type: ignore[assignment]  # importing it fails

    import torch
    import transformers
    from safetensors.torch import load_file

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.add_handler(Listener(logging.WARNING))
    with warnings.catch_warnings(record=True) as caught:
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder,
            dtype="auto",
            device_map=device_map or None,
            trust_remote_code=trust_remote_code == "True",
            output_loading_info=True,
        )
    said += [str(warning.message) for warning in caught]
    inputs = load_file(example)
    expected = inputs.pop("logits").float()
    with torch.no_grad():
        logits = model.eval()(**{name: part.to(model.device) for name, part in inputs.items()}).logits.float().cpu()
    found = {
        name: sorted(map(str, info.get(name) or ())) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    difference = logits - expected
    if difference.ndim == 3:  # one of each token
        difference = difference[inputs["attention_mask"].bool()]
    differ_by = float(difference.abs().max())
    print(json.dumps({**found, "warnings": said, "logits_differ_by": differ_by, "class": type(model).__name__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
