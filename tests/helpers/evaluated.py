"""For tests of evaluation: problems in HumanEval's form, a tiny model with a selection bias, a tokenizer like Llama's."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_phibalance as phb
from hf_phibalance.models import build_model, train_tokenizer
from hf_phibalance.tasks import make_splits


ADD_ONE = {
    "task_id": "test/0",
    "prompt": "def add_one(x):\n",
    "entry_point": "add_one",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n",
}
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "experts_implementation": "eager",
}


def biased_mixtral():
    """Returns `(model, tokenizer)`: a tiny random patched Mixtral whose selection bias prefers its first expert."""
    rows = make_splits(300, 0, 20)
    tokenizer = train_tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows["train"])
    torch.manual_seed(0)
    model = phb.patch(build_model("mixtral", FIELDS, tokenizer), {"coef": 0.0, "bias_coef": 0.01})
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: torch.tensor([0.5, 0.0, 0.0, -0.5]) for name in balancer.layer_names})
    return model, tokenizer


FUNCTIONS = {
    "double": ("    return 2 * x\n", "    assert candidate(3) == 6\n"),
    "is_even": ("    return x % 2 == 0\n", "    assert candidate(4) and not candidate(5)\n"),
    "digits": ("    return len(str(x))\n", "    assert candidate(123) == 3\n"),
}


def completed_functions():
    """Returns three problems in HumanEval's form, and their solutions."""
    problems = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {name}(x):\n    """ Made up.\n    """\n',
            "entry_point": name,
            "canonical_solution": solution,
            "test": f"def check(candidate):\n{test}",
        }
        for number, (name, (solution, test)) in enumerate(FUNCTIONS.items())
    ]
    return problems, [problem["canonical_solution"] for problem in problems]


def recorded(answers):
    """Returns a stand-in for a model of lm-evaluation-harness. It records prompts and returns `answers` in turn."""
    from lm_eval.api.model import LM

    class Recorded(LM):
        def __init__(self):
            super().__init__()
            self.prompts = []

        def generate_until(self, requests, disable_tqdm=False):
            self.prompts += [request.args for request in requests]
            return [answers[index % len(answers)] for index in range(len(requests))]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Recorded()


def llama_like():
    """Returns a tokenizer like Llama's: spaces are marks on tokens, and decoding drops the first space."""
    pieces = ["<unk>", "<s>", "</s>", "\n", "▁", "▁▁", "▁▁▁▁", *(chr(code) for code in range(33, 127))]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
