"""Prompts and completions: MBPP in HumanEval's form, and rows as text, as chats, and as TRL trains them."""

import ast
import json
import re
import subprocess
import sys
import zlib

import pytest
from paths import DATA
from task_rows import GSM8K, HUMANEVAL, MBPP, needs_data

from hf_phibalance.models import build_model, train_tokenizer
from hf_phibalance.tasks import TASKS, load_rows, to_sft_dataset


def test_mbpp_gets_the_form_of_humaneval():
    task = TASKS["mbpp"]
    assert task.prompt(MBPP) == (
        "import math\nBASE = 0\n\ndef helper(x):\n    return x\n\n\n"
        'def largest(a, b=2):\n    """ Write a function to find the "largest" of \\\\two numbers.\n'
        '    >>> largest(1, 5)\n    5\n    """\n'
    )
    assert task.completion(MBPP) == "    if a > b:\n        return helper(a)\n    return b\n"
    docstring = ast.get_docstring(ast.parse(task.prompt(MBPP)).body[-1])
    assert docstring.splitlines()[0] == MBPP["text"]


@pytest.mark.parametrize(
    ("test", "example"),
    [
        ("assert not f(1)", ">>> not f(1)\n    True"),
        ("assert set(f('\"\"\"')) == {'a'}", ">>> set(f('\\\"\"\"'))\n    {'a'}"),
        ("assert math.isclose(f(1), 2.0)", ">>> math.isclose(f(1), 2.0)\n    True"),
    ],
)
def test_other_asserts_become_examples(test, example):
    row = MBPP | {"code": "@cache\ndef f(x):\n    def g():\n        return x\n    return g", "test_list": [test]}
    prompt, completion = TASKS["mbpp"].prompt(row), TASKS["mbpp"].completion(row)
    assert prompt.startswith('@cache\ndef f(x):\n    """ Write') and example in prompt
    assert completion == "    def g():\n        return x\n    return g\n"
    assert ast.get_docstring(ast.parse(prompt + completion).body[0]) is not None


@pytest.mark.slow
@needs_data
def test_mbpp_still_passes_its_tests():
    programs = []
    for row in load_rows("mbpp", str(DATA / "mbpp"), "all")[::9]:
        code = TASKS["mbpp"].prompt(row) + TASKS["mbpp"].completion(row)
        programs.append("\n".join([code, row["test_setup_code"], *row["test_list"]]))
    # the data set's own programs, in another process only because they may leave anything behind
    runner = "import json, sys\nfor program in json.load(sys.stdin): exec(program, {'__name__': 'row'})\nprint('done')"
    command = [sys.executable, "-W", "ignore", "-c", runner]
    done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("done\n"), done.stderr


class ChatTokenizer:
    """One token for each character, or for a line break with the white space after it."""

    eos_token_id = 0

    def __init__(self, content, end=">"):
        self.chat_template, self.end = "<{role" + end + content, end

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [zlib.crc32(word.encode()) for word in re.findall(r"\n\s*|.", text)]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        strip = "strip" in self.chat_template
        texts = [f"<{m['role']}{self.end}{m['content'].strip() if strip else m['content']}" for m in messages]
        return "".join([*texts, f"<assistant{self.end}"] if add_generation_prompt else texts)


def test_datasets_for_trl(warned):
    plain = to_sft_dataset("gsm8k", [GSM8K])
    assert plain.to_list() == [
        {"prompt": f"Question: {GSM8K['question']}\nAnswer:", "completion": f" {GSM8K['answer']}"}
    ]
    (chat,) = to_sft_dataset("gsm8k", [GSM8K], ChatTokenizer("{content | strip}")).to_list()
    assert chat["prompt"] == [{"role": "user", "content": plain[0]["prompt"]}]
    assert chat["completion"] == [{"role": "assistant", "content": GSM8K["answer"]}]
    (chat,) = to_sft_dataset("mbpp", [MBPP], ChatTokenizer("{content}")).to_list()
    assert chat["completion"][0]["content"] == TASKS["mbpp"].completion(MBPP)
    assert not warned.lines
    for tokenizer in (ChatTokenizer("{content | strip}"), ChatTokenizer("{content}", end="\n")):
        (code,) = to_sft_dataset("mbpp", [MBPP], tokenizer).to_list()
        assert code["prompt"] == TASKS["mbpp"].prompt(MBPP)
        assert code["completion"] == TASKS["mbpp"].completion(MBPP)
    assert len(warned.about("The chat template changes the completions of mbpp")) == 2
    with pytest.raises(ValueError, match="no rows of gsm8k"):
        to_sft_dataset("gsm8k", [])
    with pytest.raises(ValueError, match="humaneval is for evaluation only"):
        to_sft_dataset("humaneval", [HUMANEVAL])


@pytest.mark.slow
def test_trl_trains_the_completion_only(tmp_path):
    from trl import SFTConfig, SFTTrainer

    code = TASKS["mbpp"].prompt(MBPP) + TASKS["mbpp"].completion(MBPP)
    tokenizer = train_tokenizer([GSM8K["question"], GSM8K["answer"], *[code] * 50])
    alone = tokenizer(TASKS["mbpp"].prompt(MBPP))["input_ids"]
    assert tokenizer(code)["input_ids"][: len(alone)] != alone  # merges the line break and the indentation
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model("llama", fields | {"num_key_value_heads": 2}, tokenizer)
    args = SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, max_length=None)
    for task, row in (("gsm8k", GSM8K), ("mbpp", MBPP)):
        dataset = to_sft_dataset(task, [row], tokenizer)
        trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        trained = batch["input_ids"][batch["labels"] != -100]
        prompt = tokenizer(TASKS[task].prompt(row))["input_ids"]
        assert batch["input_ids"][0, : len(prompt)].tolist() == prompt  # what generation will start from
        assert tokenizer.decode(trained) == TASKS[task].completion(row) + tokenizer.eos_token
        assert tokenizer.decode(batch["input_ids"][batch["labels"] == -100]) == TASKS[task].prompt(row)
