"""Chat templates: what they write, and what they may not do."""

import json
import time

import pytest

from cases.tokenizers import CHATML_LIKE, MIXTRAL_LIKE, WRITERS, write_json_tokenizer
from moejax.data import DataError
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.text import chat
from moejax.interop.hf.text.chat import ChatTemplate, read_chat

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "<Bye> & 日本"},
]


def render(source, messages=TALK, **variables):
    return ChatTemplate(source, TOKENS, "here").render(messages, **variables)


def refusal(source, messages=TALK, **variables):
    with pytest.raises(HfError) as error:
        render(source, messages, **variables)
    message = str(error.value)
    assert "\n" not in message and message.startswith("here: the chat template ")
    return message


def test_a_template_with_instructions_writes_what_the_model_was_trained_on():
    expected = "<s> [INST] Hello [/INST] Hi</s> [INST] <Bye> & 日本 [/INST]"
    assert render(MIXTRAL_LIKE) == expected


def test_a_template_with_roles_ends_where_the_answer_begins():
    expected = "<|im_start|>user\nHello<|im_end|>\n"
    assert render(CHATML_LIKE, TALK[:1], add_generation_prompt=False) == expected
    assert render(CHATML_LIKE, TALK[:1]) == expected + "<|im_start|>assistant\n"


def test_a_template_has_what_others_expect_of_one():
    source = (
        "{%- for message in messages -%}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif -%}\n"
        "    {% generation %}{{ message.content }}{% endgeneration %}\n"
        "    {% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}\n"
        "{% endfor %}\n"
        "{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ nothing is defined }}"
    )
    text = render(source, tools=[{"name": "<é>"}])
    assert text == 'Hello2\n[{"name": "<é>"}]4False'


def test_messages_that_a_template_refuses_are_said_with_its_reason():
    message = refusal(MIXTRAL_LIKE, TALK[1:])
    assert "refuses these messages: roles must alternate: user, assistant, user" in message
    assert "cannot write these messages" in refusal("{{ messages[7].content.text }}")
    assert "is damaged: line 2: " in refusal("\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({}) }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ raise_exception.__globals__['sys'].exit() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
    ],
)
def test_a_template_that_tries_to_leave_its_sandbox_is_refused(source):
    assert "tries to leave its sandbox" in refusal(source)


def test_a_template_can_neither_read_nor_import_files(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for source in (
        f"{{% include '{tmp_path}/secret.txt' %}}",
        f"{{% import '{tmp_path}/secret.txt' as secret %}}",
        f"{{% extends '{tmp_path}/secret.txt' %}}",
    ):
        refusal(source)


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a large value": "{% set a = 'a' * ((messages | length) * 2 ** 29) %}done",
    "a width": "{{ '%99999999999d' | format(1) }}",
    "much text": "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_end_is_stopped(case, monkeypatch):
    monkeypatch.setattr(chat, "MAX_WAIT_S", 1.5)
    start = time.monotonic()
    message = refusal(ENDLESS[case])
    assert "memory" in message
    assert time.monotonic() - start < 8  # the processor's limit is 10


def test_its_own_clock_stops_a_template(monkeypatch, tmp_path):
    renderer = tmp_path / "render.py"
    renderer.write_text(chat.RENDERER.read_text().replace("MAX_SECONDS = 10", "MAX_SECONDS = 1"))
    monkeypatch.setattr(chat, "RENDERER", renderer)
    start = time.monotonic()
    assert "does not end" in refusal(ENDLESS["nested loops"])
    assert time.monotonic() - start < chat.MAX_WAIT_S / 2


def test_a_renderer_that_fails_is_said(monkeypatch, tmp_path):
    renderer = tmp_path / "render.py"
    renderer.write_text("raise SystemExit('no Jinja')")
    monkeypatch.setattr(chat, "RENDERER", renderer)
    assert "cannot be rendered (no Jinja)" in refusal("a")


def test_messages_are_plain_data():
    with pytest.raises(HfError, match="must be plain data"):
        render("a", [{"role": object()}])


def test_a_template_of_its_own_file_counts_before_that_of_the_settings(tmp_path):
    write_json_tokenizer(tmp_path, chat_template="settings {{ eos_token }}")
    assert read_chat(tmp_path).render([]) == "settings <|im_end|>"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d{{pad_token}}"}]
    write_json_tokenizer(tmp_path, chat_template=named)
    assert read_chat(tmp_path).render([]) == "d<|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}.")
    assert read_chat(tmp_path).render([]) == "file ."  # it has none
    (tmp_path / "chat_template.jinja").unlink()
    write_json_tokenizer(tmp_path, chat_template=None)
    assert read_chat(tmp_path) is None


@pytest.mark.parametrize("template", [3, {}, [], [{"name": "tools", "template": "t"}], ["default"]])
def test_a_damaged_template_names_its_file(tmp_path, template):
    write_json_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(HfError, match=rf"{tmp_path}/tokenizer_config.json: chat_template must be"):
        read_chat(tmp_path)


def test_a_template_file_that_cannot_be_one_is_refused(tmp_path):
    path = write_json_tokenizer(tmp_path).with_name("chat_template.jinja")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(HfError, match=r"chat_template.jinja is damaged"):
        read_chat(tmp_path)
    path.write_text("a" * 2**21)
    with pytest.raises(HfError, match="has more than 1048576 characters"):
        read_chat(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"chat_template.jinja"):
        read_chat(tmp_path)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_tokens_of_the_settings_are_names_in_the_template(tmp_path, kind):
    settings = json.loads(
        WRITERS[kind](tmp_path, unk_token="<what>").with_name("tokenizer_config.json").read_text()
    )
    settings["chat_template"] = "{{ unk_token }}{{ eos_token }}{{ add_bos_token is defined }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    end = {"json": "<|im_end|>", "pieces": "</s>"}[kind]
    assert read_chat(tmp_path).render([]) == f"<what>{end}False"
