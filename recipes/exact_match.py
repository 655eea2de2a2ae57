"""Measures exact match on GSM8K during training."""

import torch
from transformers import TrainerCallback

from hf_phibalance.evaluation import GSM8K_STOPS, score_gsm8k, truncate


class Examiner(TrainerCallback):
    """
    Scores greedy zero-shot answers by GSM8K's strict match. As a callback, logs `eval_exact_match` in evaluations.

    Args:
        trainer ([`~transformers.Trainer`]): Its model is examined.
        args: The options of the recipe.
        dataset ([`~datasets.Dataset`]): Column `prompt` of the problems for the callback, as text or as chats.
        rows (`list[dict]`): The same problems, with their answers.
    """

    def __init__(self, trainer, args, dataset, rows):
        self.trainer, self.args, self.dataset, self.rows = trainer, args, dataset, rows
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        self.is_able = args.task == "gsm8k" and not is_sharded
        if not self.is_able:
            why = "the weights are sharded" if is_sharded else "generated code is not run while training"
            trainer.accelerator.print(f"No exact match, since {why}: use recipes/evaluate.py afterwards.", flush=True)

    def prompts(self, dataset):
        """Returns the prompts as text."""
        template = self.trainer.processing_class.apply_chat_template
        return [
            one if isinstance(one, str) else template(one, tokenize=False, add_generation_prompt=True)
            for one in dataset["prompt"]
        ]

    def exact_match(self, dataset, rows):
        """Returns the share of right answers over all processes, or `None` where the model cannot generate."""
        if not self.is_able:
            return None
        model, tokenizer, accelerator = self.trainer.model, self.trainer.processing_class, self.trainer.accelerator
        is_chat = not isinstance(dataset["prompt"][0], str)  # then the template has written the special tokens
        own = list(zip(self.prompts(dataset), rows))[accelerator.process_index :: accelerator.num_processes]
        right, was_training = torch.zeros((), device=model.device), model.training
        model.eval()
        for start in range(0, len(own), self.args.generation_batch_size):
            prompts, batch = zip(*own[start : start + self.args.generation_batch_size])
            inputs = tokenizer(list(prompts), padding=True, return_tensors="pt", add_special_tokens=not is_chat)
            tokens = model.generate(
                **inputs.to(model.device), do_sample=False, max_new_tokens=self.args.max_new_tokens
            )
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for text, row in zip(texts, batch):
                right += score_gsm8k(truncate(text, GSM8K_STOPS), row["answer"])["strict_match"]
        model.train(was_training)
        return accelerator.reduce(right).item() / max(len(rows), 1)

    def on_evaluate(self, training_args, state, control, metrics, **kwargs):
        if "eval_loss" in metrics:  # not an evaluation of the test problems
            self.trainer.log({"eval_exact_match": self.exact_match(self.dataset, self.rows)})
