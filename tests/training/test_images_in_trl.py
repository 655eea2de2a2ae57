"""SFTTrainer on a data set with images, through a real processor and TRL's own collator."""

import pytest
import torch
from checks import assert_same
from datasets import Dataset
from tiny_vlm import draw, image_processor, tiny_image_model
from training import Recorder
from transformers import AriaProcessor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import hf_phibalance as phb
from hf_phibalance.models import train_tokenizer


pytestmark = pytest.mark.slow


MODEL_TYPE = "aria"  # whose processor needs no torchvision
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<|img|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}"
)
TEXTS = ("a red disc", "a disc on blue, and a white line across it", "red", "blue and white, and red")


def processor():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|img|>"]})
    tokenizer.image_token, tokenizer.image_token_id = "<|img|>", tokenizer.convert_tokens_to_ids("<|img|>")
    reader = AriaProcessor(image_processor(MODEL_TYPE), tokenizer, chat_template=TEMPLATE, size_conversion={490: 8})
    reader.images_kwargs = {"max_image_size": 490, "split_image": False}  # the smaller one of the two that it knows
    return reader


def pictures_with_texts():
    def row(text, size):
        said = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": text}]
        return {"images": [draw(*size)], "messages": said}

    return Dataset.from_list([row(*pair) for pair in zip(TEXTS, ((16, 16), (24, 16), (16, 32), (32, 24)))] * 2)


def test_a_run_on_images(tmp_path):
    reader = processor()
    model = tiny_image_model(MODEL_TYPE, vocab_size=len(reader.tokenizer), max_position_embeddings=256)
    model.config.image_token_index = model.config.image_token_id = reader.image_token_id
    phb.patch(model.train(), {"coef": 0.5, "bias_coef": 0.01})
    recorder = Recorder(model)
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "max_steps": 3,
        "learning_rate": 0.02,
    }
    options |= {"save_steps": 3, "logging_steps": 1, "max_length": None, "report_to": [], "disable_tqdm": True}
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), bf16=False, use_cpu=True, **options),
        train_dataset=pictures_with_texts(),
        processing_class=reader,
        callbacks=[recorder],
    )
    assert isinstance(trainer.data_collator, DataCollatorForVisionLanguageModeling)
    callback = phb.attach(trainer, verify=True)
    trainer.train()
    assert callback.report.coefficient.ratio == pytest.approx(1, abs=1e-3)
    logged = [entry["moe/tokens"] for entry in trainer.state.log_history if "moe/tokens" in entry]
    counted = [sum(int(batch["attention_mask"].sum()) for batch in step) for step in recorder.steps]
    assert logged == counted and len(logged) == 3
    images = [int((batch["input_ids"] == reader.image_token_id).sum()) for step in recorder.steps for batch in step]
    assert set(images) == {8}

    checkpoint = tmp_path / "checkpoint-3"
    loaded = phb.AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert type(loaded) is type(model)
    assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
    batch = dict(trainer.data_collator([pictures_with_texts()[1]]))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
