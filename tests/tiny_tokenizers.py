"""Tokenizers of the text encoders' own kinds, trained on a few sentences."""

import json
from functools import cache

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

SENTENCES = [
    "a photo of a cat",
    "a red dog on the beach",
    "a painting of a squirrel eating a burger",
    "one small digit, handwritten in white on black",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment.",
    "zebra quick fox jumps over lazy vow; 0123456789",
]

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _byte_level(suffix, specials, size=400):
    """A vocabulary and merges over bytes, by byte-pair encoding."""
    ends = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ends))
    if suffix:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size + 256 * bool(suffix),
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
        **ends,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = _model(tokenizer)
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _model(tokenizer):
    return json.loads(tokenizer.to_str())["model"]


def clip_tokenizer(length=77):
    vocab, merges = _byte_level("</w>", ("<|startoftext|>", "<|endoftext|>"))
    return CLIPTokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=length)


def qwen_tokenizer():
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab, merges = _byte_level("", specials)
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def t5_tokenizer():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    vocab = [(token, score) for token, score in _model(tokenizer)["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def gemma_tokenizer():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = _model(tokenizer)
    return GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=512)


def plain_tokenizer(padding_side="right", bos=None):
    """Any other tokenizer, as `AutoTokenizer` would load it."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab, merges = _byte_level("", specials)
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token=bos,
        padding_side=padding_side,
        model_max_length=512,
        chat_template=CHAT,
    )
