"""Text that comes one id at a time: the same text, never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.tokenizers import WRITERS
from moejax.data.tokenizers import ByteTokenizer, TextStream, continuation, open_tokenizer

TEXT = "the people asked: été 日本 👩‍👩‍👧 and\n\n  more bread"


@pytest.fixture(scope="module", params=["bytes", *sorted(WRITERS)])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return ByteTokenizer()
    return open_tokenizer(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


def stream_parts(tokenizer, context, ids):
    stream = TextStream(tokenizer, context)
    return [*(stream.add(id) for id in ids), stream.finish()]


def test_parts_join_to_the_text_and_none_has_half_a_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    parts = stream_parts(tokenizer, [tokenizer.bos_id], ids)
    assert "".join(parts) == TEXT
    assert not any("\ufffd" in part for part in parts)
    assert sum(part != "" for part in parts) > 20  # it comes as it is written, not at the end


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 200))
def test_a_continuation_is_what_the_ids_add_wherever_the_context_ends(tokenizer, place):
    ids = tokenizer.encode(TEXT)
    place = min(place, len(ids))
    before = tokenizer.decode(ids[:place])
    if before.endswith("\ufffd"):  # within a character
        return
    assert before + continuation(tokenizer, ids[:place], ids[place:]) == TEXT


def test_characters_that_are_never_finished_show_at_the_end(tokenizer):
    *ids, _ = tokenizer.encode("鐵")  # in no vocabulary
    *parts, last = stream_parts(tokenizer, [], ids)
    assert "".join(parts).strip() == "" and "\ufffd" in last
