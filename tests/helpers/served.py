"""
Gets answers of vLLM: `python served.py FOLDER ...` serves one checkpoint after the other. Asks for the
log-probabilities of the rows in FOLDER/rows.json and for GREEDY more tokens, and writes both to FOLDER/answers.json.
"""

import json
import sys
from pathlib import Path


GREEDY = 8  # tokens


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = SamplingParams(max_tokens=GREEDY, temperature=0, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    for folder in map(Path, sys.argv[1:]):
        rows = json.loads((folder / "rows.json").read_text())
        engine = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=len(rows))
        answers = engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
        written = []
        for row, answer in zip(rows, answers):
            (completion,) = answer.outputs
            told = [(row[at], answer.prompt_logprobs[at]) for at in range(1, len(row))]
            told += zip(completion.token_ids, completion.logprobs)
            written.append(
                {"tokens": list(completion.token_ids), "logprobs": [of[token].logprob for token, of in told]}
            )
        (folder / "answers.json").write_text(json.dumps(written))
        del engine


if __name__ == "__main__":
    main()
