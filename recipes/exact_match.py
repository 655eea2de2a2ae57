"""How well a model answers while it is being trained: greedy exact match on held-out problems."""

import torch
from transformers import TrainerCallback

from hf_phibalance.evaluation import GSM8K_STOPS, extract_strict, normalise_answer, truncate


class Examiner(TrainerCallback):
    """
    Exact match of greedily generated answers by the strict-match rule of GSM8K, without examples; the problems are
    divided among the processes. As a callback it logs `eval_exact_match` at every evaluation.

    Not while weights are sharded (FSDP, ZeRO), and not for code: `recipes/evaluate.py` examines the finished model.

    Args:
        trainer ([`~transformers.Trainer`]): whose model is examined.
        args: the options of the recipe.
        dataset ([`~datasets.Dataset`]): column `prompt` of the problems for the callback, as text or as chats.
        rows (`list[dict]`): the same problems, with their answers.
    """

    def __init__(self, trainer, args, dataset, rows):
        self.trainer, self.args, self.dataset, self.rows = trainer, args, dataset, rows
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        self.is_able = args.task == "gsm8k" and not is_sharded
        if not self.is_able:
            why = "the weights are sharded" if is_sharded else "generated code is not run while training"
            trainer.accelerator.print(
                f"No exact match, since {why}: recipes/evaluate.py examines the finished model.", flush=True
            )

    def prompts(self, dataset):
        """What the model is given, as text."""
        prompts = list(dataset["prompt"])
        if isinstance(prompts[0], str):
            return prompts
        template = self.trainer.processing_class.apply_chat_template
        return [template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]

    def exact_match(self, dataset, rows):
        """Share of right answers, the same on every process; `None` where it cannot be had."""
        if not self.is_able:
            return None
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        rank, ranks = self.trainer.args.process_index, self.trainer.args.world_size
        is_chat = not isinstance(dataset["prompt"][0], str)  # then the template has written the special tokens
        problems = list(zip(self.prompts(dataset), rows))[rank::ranks]
        was_training = model.training
        model.eval()
        right = torch.zeros((), device=model.device)
        for start in range(0, len(problems), self.args.generation_batch_size):
            prompts, batch = zip(*problems[start : start + self.args.generation_batch_size])
            inputs = tokenizer(list(prompts), padding=True, return_tensors="pt", add_special_tokens=not is_chat)
            tokens = model.generate(
                **inputs.to(model.device), do_sample=False, max_new_tokens=self.args.max_new_tokens, use_cache=True
            )
            answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for answer, row in zip(answers, batch):
                number = normalise_answer(extract_strict(truncate(answer, GSM8K_STOPS)))
                right += number == normalise_answer(row["answer"])
        model.train(was_training)
        return self.trainer.accelerator.reduce(right).item() / max(len(rows), 1)

    def on_step_end(self, training_args, state, control, **kwargs):
        steps = state.eval_steps
        if training_args.eval_strategy == "steps" and (
            state.global_step % steps == 0 or state.global_step == state.max_steps
        ):
            self._log(control)

    def on_epoch_end(self, training_args, state, control, **kwargs):
        if training_args.eval_strategy == "epoch":
            self._log(control)

    def _log(self, control):
        should_log = control.should_log  # which logging resets
        self.trainer.log({"eval_exact_match": self.exact_match(self.dataset, self.rows)})
        control.should_log = should_log
