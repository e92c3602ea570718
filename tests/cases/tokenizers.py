"""Tiny tokenizers in the layout of released models."""

import functools
import io
import json

CORPUS = [
    "The people of the harbour asked the people of the town. ",
    "What did they ask? They asked for bread, and for more bread.",
    "def f(x):\n        return x\n",
    "été 日本 naïve",
]

MIXTRAL_LIKE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

CHATML_LIKE = """\
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def json_content(num_ids=320):
    """Returns a `tokenizer.json`: byte-level BPE with the tokens of a chat, and no begin."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ids - len(CHATML_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS * 20, trainer)
    library.add_special_tokens(list(CHATML_TOKENS))  # after the vocabulary, as Qwen has them
    return library.to_str().encode()


@functools.cache
def piece_content():
    """Returns a sentencepiece model as Mixtral has one: a space before each text, byte fallback."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return model.getvalue()


JSON_SETTINGS = {
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "add_bos_token": False,
    "chat_template": CHATML_LIKE,
}

PIECE_SETTINGS = {
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": None,
    "chat_template": MIXTRAL_LIKE,
}


def write_json_tokenizer(folder, **settings):
    """Writes a tokenizer.json and its settings; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(json_content())
    (folder / "tokenizer_config.json").write_text(json.dumps(JSON_SETTINGS | settings))
    return folder / "tokenizer.json"


def write_piece_tokenizer(folder, **settings):
    """Writes a tokenizer.model and its settings; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(piece_content())
    (folder / "tokenizer_config.json").write_text(json.dumps(PIECE_SETTINGS | settings))
    return folder / "tokenizer.model"


WRITERS = {"json": write_json_tokenizer, "pieces": write_piece_tokenizer}
