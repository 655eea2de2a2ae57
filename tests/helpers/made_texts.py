"""Generated texts with one token per word, `w3` to `w127`, and their tokenizer."""

import torch
from tiny import FIRST_PLAIN_ID, SHRINK
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_phibalance.inspection import parse_domains


SEQ_LEN = 12


def words(count, first=FIRST_PLAIN_ID, last=SHRINK["vocab_size"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(first, last, (count,), generator=generator).tolist())


def make_tokenizer(bos=False):
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(FIRST_PLAIN_ID, SHRINK["vocab_size"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def domains_of(texts):
    return parse_domains(texts[0], ["low=body"])


def cut(documents, room):
    return [document[i : i + room] for document in documents for i in range(0, len(document), room)]
