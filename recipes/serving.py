"""
Compare vLLM with transformers on an exported checkpoint, by the log-probabilities of the same tokens.

phibalance export results/mine results/mine-plain --texts code=hf_phibalance
python recipes/serving.py expect results/mine-plain --output expected.json      # where transformers is
python recipes/serving.py serve results/mine-plain --expected expected.json     # where vLLM is, perhaps another environment
"""

import argparse
import json
import random
from pathlib import Path

from hf_phibalance.files import replace_unprintable


ROWS, TOKENS = 4, 24


def expect(folder: str, output: str) -> None:
    """Writes random tokens and the log-probabilities that transformers gives them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model.eval()
    draw = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = [draw.randrange(3, model.config.get_text_config().vocab_size) for _ in range(TOKENS)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        rows.append({"ids": ids, "logprobs": logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()})
    Path(output).write_text(json.dumps(rows))


def serve(folder: str, expected: str) -> float:
    """Returns the largest difference between vLLM's log-probabilities and those in the file `expected`."""
    from vllm import LLM, SamplingParams

    rows = json.loads(Path(expected).read_text())
    engine = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=2 * TOKENS, max_num_seqs=ROWS)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    answers = engine.generate([{"prompt_token_ids": row["ids"]} for row in rows], asked)
    return max(
        abs(found[token].logprob - wanted)
        for row, answer in zip(rows, answers)
        for token, found, wanted in zip(row["ids"][1:], answer.prompt_logprobs[1:], row["logprobs"])
    )


if __name__ == "__main__":
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("expect", "serve"))
    parser.add_argument("folder")
    parser.add_argument("--output", default="expected.json")
    parser.add_argument("--expected", default="expected.json")
    args = parser.parse_args()
    if args.step == "expect":
        expect(args.folder, args.output)
    else:
        print(f"largest difference of a log-probability: {serve(args.folder, args.expected):.2e}")
