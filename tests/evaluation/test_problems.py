"""The problems as they are put to a model: with the shots of lm-evaluation-harness, or as a chat."""

import json
import random

import pytest
from paths import DATA

from hf_phibalance.evaluation import as_chats, load_problems, make_prompts
from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


GSM8K = DATA / "gsm8k"


def test_shots_are_those_of_the_harness(tmp_path):
    samplers = pytest.importorskip("lm_eval.api.samplers")
    rows = make_splits(50, 0, 6, seed=3)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    problems, shots = load_problems("gsm8k", str(tmp_path), num_fewshot=5)
    assert problems == rows["test"] and shots == rows["train"]
    prompts = make_prompts("gsm8k", problems, shots, num_fewshot=5)
    sampler = samplers.ContextSampler(shots, rnd=1234)
    for problem, prompt in zip(problems, prompts):
        drawn = sampler.sample(5)
        examples = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in drawn]
        assert prompt == "\n\n".join([*examples, f"Question: {problem['question']}\nAnswer:"])


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K data")
def test_real_problems_have_five_shots():
    problems, shots = load_problems("gsm8k", str(GSM8K), num_fewshot=5, limit=2)
    assert len(shots) == 7473
    draw = random.Random(1234)
    for problem, prompt in zip(problems, make_prompts("gsm8k", problems, shots, num_fewshot=5)):
        assert prompt.count("Question:") == 6 and prompt.endswith("\nAnswer:") and problem["question"] in prompt
        assert all(row["answer"] in prompt for row in draw.sample(shots, 5))


def test_chat_template():
    problems, _ = load_problems("gsm8k", "toy", limit=1)
    texts = make_prompts("gsm8k", problems)
    tokenizer = train_tokenizer(texts)
    with pytest.raises(ValueError, match="apply_chat_template=True, but the tokenizer"):
        as_chats(texts, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (text,) = as_chats(texts, tokenizer)
    assert text == f"<user>Question: {problems[0]['question']}\nAnswer:<assistant>"
