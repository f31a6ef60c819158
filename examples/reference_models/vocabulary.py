"""The tokenizer of the reference language models: byte-pair encoding of 1,024 tokens over bytes."""

from __future__ import annotations

from pathlib import Path

from corpus import read_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 1024
END, PADDING = "<|endoftext|>", "<|padding|>"
END_ID, PADDING_ID = 0, 1
SHIPPED = Path(__file__).parent / "models" / "llama" / "tokenizer.json"


def train_vocabulary(texts: list[str]) -> Tokenizer:
    """Return a tokenizer fitted to texts; every byte string can be encoded and comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # a text starts where another ended
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, END_ID)]),
        ]
    )
    return tokenizer


def vocabulary() -> Tokenizer:
    """Return the shipped tokenizer, or train it where none is shipped yet."""
    if SHIPPED.is_file():
        return Tokenizer.from_file(str(SHIPPED))
    return train_vocabulary(read_split("train"))


def as_pretrained(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer in the form that is saved beside a model of this context length."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
