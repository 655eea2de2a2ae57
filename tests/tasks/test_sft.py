"""Rows for the trainer: prompts and completions, as text, as chats, and as TRL trains them."""

import pytest
from task_rows import GSM8K, HUMANEVAL, MBPP

from hf_phibalance.models import build_model, train_tokenizer
from hf_phibalance.tasks import TASKS, to_sft_dataset


class ChatTokenizer:
    def __init__(self, content):
        self.chat_template = "<{role}>" + content

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, tokenize):
        strip = "strip" in self.chat_template
        return "".join(f"<{m['role']}>{m['content'].strip() if strip else m['content']}" for m in messages)


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
    (code,) = to_sft_dataset("mbpp", [MBPP], ChatTokenizer("{content | strip}")).to_list()
    assert code == {"prompt": TASKS["mbpp"].prompt(MBPP), "completion": TASKS["mbpp"].completion(MBPP)}
    assert warned.about("The chat template changes the completions of mbpp")
    with pytest.raises(ValueError, match="no rows of gsm8k"):
        to_sft_dataset("gsm8k", [])
    with pytest.raises(ValueError, match="humaneval is for evaluation only"):
        to_sft_dataset("humaneval", [HUMANEVAL])


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
