# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the page reader: byte-level BPE with merges only for words of the questions.

Upper-case letters and digits are never merged, so that each glyph of a key or value is one token.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.pages import TEMPLATES

PAD, END = "<pad>", "</s>"
USER, ASSISTANT, IMAGE = "<|user|>", "<|assistant|>", "<image>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, IMAGE)
_VOCABULARY_SIZE = 384


def build_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, with ``more`` special tokens after the others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [t.format("") for templates in TEMPLATES.values() for t in templates]
    words = sorted({word for text in corpus for word in text.replace("?", " ").split()})
    # Capitals occur only at the start of a question, so they merge only with lower-case letters.
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus + [" " + w for w in words if w.islower()], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *more)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, IMAGE, *more],
        clean_up_tokenization_spaces=False,
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
