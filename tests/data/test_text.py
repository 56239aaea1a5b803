"""Standardising, splitting and putting back together."""

import re
import string
import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.text import STYLES, detokenise, gaps, lower, settled, surfaces, tokenise

# Edge cases of the rules: the tag whole, cut and in capitals, characters that only some languages
# take for white space, letters whose lower case is outside ASCII, and NUL.
PIECES = st.sampled_from(
    [
        *("<br />", "<BR />", "<br /", "<br/>", "[UNK]", "a", "Z", "İ", "É", "…", "7"),
        *("“", "’", "—", "Ж", "ẞ", "Σ", "😀", "\ud7a3", "。"),
        *string.punctuation,
        *" \t\n\v\f\r\x00\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000\ufeff",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join)


def tokens_of(text: str, style: str) -> list[str]:
    return tokenise(pa.array([text]), style).to_pylist()[0]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(TEXTS, max_size=8))
def test_published_is_the_script_s_standardisation_and_split(texts):
    import tensorflow as tf

    strings = tf.strings.lower(tf.constant(texts, tf.string, shape=(len(texts),)))
    strings = tf.strings.regex_replace(strings, "<br />", " ")
    strings = tf.strings.regex_replace(strings, f"([{string.punctuation}])", r" \1")
    expected = [[t.decode() for t in row] for row in tf.strings.split(strings).to_list()]
    assert tokenise(pa.array(texts, pa.string()), "published").to_pylist() == expected


@settings(deadline=None, max_examples=100, derandomize=True)
@given(TEXTS)
def test_spaced_puts_each_mark_alone(text):
    expected = text.encode().lower().replace(b"<br />", b" ")
    marks = re.escape(string.punctuation.replace("\\", "")).encode()
    expected = re.sub(rb"([%b])" % marks, rb" \1 ", expected)
    assert tokens_of(text, "spaced") == [token.decode() for token in expected.split()]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(TEXTS)
def test_words_know_every_script(text):
    expected = re.sub("<br ?/?>", " ", text, flags=re.IGNORECASE)
    apart = "".join(f" {c} " if is_mark(c) else c for c in expected)
    # str.isspace knows more separators in ASCII than a word list on lines can do without.
    apart = re.sub(r"(?![\x1c-\x1f])\s", " ", apart)
    expected = [token for token in apart.split(" ") if token]
    assert surfaces(pa.array([text]), "words").to_pylist() == [expected]
    one_to_one = [c.lower() if len(c.lower()) == 1 else "i" for c in "".join(expected)]
    assert "".join(tokens_of(text, "words")) == "".join(one_to_one)


def is_mark(char: str) -> bool:
    if char.isascii():
        return char in string.punctuation.replace("\\", "")
    return unicodedata.category(char).startswith("P") and ord(char) < 0x10000


def test_words_of_several_languages():
    text = "Фильм — «фильм»!<br/>Ein “Straßenfilm”,\xa0d’été…"
    expected = "фильм — « фильм » ! ein “ straßenfilm ” , d ’ été …"
    assert tokens_of(text, "words") == expected.split(" ")
    assert tokens_of("İYİ Filmler. 映画、最高！ فيلم؟", "words") == (
        ["iyi", "filmler", ".", "映画", "、", "最高", "！", "فيلم", "؟"]
    )


def test_styles_side_by_side():
    text = 'He said "Hello".I <br />Isn\'t it\\so?'
    assert tokens_of(text, "published") == (
        ["he", "said", '"hello', '"', ".i", "isn", "'t", "it\\so", "?"]
    )
    assert tokens_of(text, "spaced") == (
        ["he", "said", '"', "hello", '"', ".", "i", "isn", "'", "t", "it\\so", "?"]
    )


@pytest.mark.parametrize("style", STYLES)
def test_texts_may_have_any_arrow_type(style):
    texts = ["One. Two", "", " <br /> ", "Trois !"]
    expected = [tokens_of(text, style) for text in texts]
    assert expected[1] == expected[2] == []
    forms = [
        pa.array(texts, pa.large_string()),
        pa.array(texts, pa.string_view()),
        pa.chunked_array([texts[:1], texts[1:]]),
        pa.array(["before", *texts, "behind"]).slice(1, 4),
    ]
    for form in forms:
        assert tokenise(form, style).to_pylist() == expected
    assert tokenise(pa.array([], pa.string()), style).to_pylist() == []


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="published"):
        tokenise(pa.array(["a"]), "plain")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "text",
    [
        "I haven't seen it. It's ours, isn't it?",
        'He said "hello there," and "(goodbye)". Then he left...',
        "The actors' names [sic] are well-known; 7/10, or 7.5 of 10: $5 for 1,000 fans at 7:30!",
        "I'm 'not sure' that it -- i.e. the film -- is 100% sci-fi and/or #1.",
        "What?! Yes. So I said... and left. Café! A\\b",
        "See http://www.imdb.com/title/tt0118883/ (or https://en.wikipedia.org/wiki/i_film).",
        "It's at www.bbc.co.uk/i/film_7.html?id=5&lang=en. Rock &amp; roll; &#39; he & she; good.",
    ],
)
def test_detokenise_restores_well_written_english(text, style):
    assert detokenise(tokens_of(text, style)) == text


@pytest.mark.parametrize(
    "text",
    [
        "Он сказал: «фильм — хороший». Да!",
        "„Gut“, sagte er. »Ja« – 1990–1995…",
        "“I’m ‘not sure’ it’s ours,” he said. The actors’ names, d’un été.",
        "«Раз» и «два»; »eins« und »zwei«; «a ‹b› c».",
        "¿Qué? ¡Sí!",
    ],
)
def test_detokenise_knows_typographic_marks(text):
    assert detokenise(tokens_of(text, "words")) == text


def test_detokenise_as_the_model_writes():
    written = "[UNK] is a [UNK] - [UNK] film . i don 't like \" the movie . . . it 's"
    expected = "[UNK] is a [UNK]-[UNK] film. I don't like \"the movie... it's"
    assert detokenise(["", *written.split(" "), ""]) == expected
    assert detokenise([]) == ""


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(PIECES | st.text(max_size=4), max_size=20))
def test_detokenise_only_adds_spaces_and_capitals(tokens):
    def visible(text: str) -> list[str]:
        return [c.lower() for c in text if c != " "]

    assert visible(detokenise(tokens)) == visible("".join(tokens))


GROWING = (
    "this actors isn t i 7 ' ' ' \" . , ? ( ) - « » ‹ › „ “ ” ‚ ‘ ’ https : / / www . com [UNK]"
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.sampled_from(GROWING.split()), min_size=8, max_size=14))
def test_what_is_settled_stays_as_the_text_grows(tokens):
    shown = [detokenise(tokens[:count]) for count in range(len(tokens) + 1)]
    ends = [settled(text) for text in shown]
    for text, end in zip(shown, ends, strict=True):
        assert shown[-1].startswith(text[:end])


def test_an_apostrophe_in_a_word_holds_nothing_back():
    assert settled("It isn't bad" + " at all" * 9) > 50


@settings(deadline=None, max_examples=100, derandomize=True)
@given(TEXTS.filter(str.isascii))
def test_spaced_tokens_survive_display(text):
    tokens = tokens_of(text, "spaced")
    assert tokens_of(detokenise(tokens), "spaced") == tokens


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["i", "it", "isn", "t", "s", "7", "10", *"\"'.,!?-/()[]$%:;"]), max_size=20
    )
)
def test_detokenise_is_idempotent(tokens):
    once = detokenise(tokens)
    assert detokenise([once]) == once


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(TEXTS, max_size=4))
@pytest.mark.parametrize("style", STYLES)
def test_surfaces_and_gaps_are_the_whole_text(style, texts):
    array = pa.array(texts, pa.string())
    typed, between = surfaces(array, style), gaps(array, style)
    assert [len(row) for row in between.to_pylist()] == [len(row) + 1 for row in typed.to_pylist()]
    for text, words, spaces in zip(texts, typed.to_pylist(), between.to_pylist(), strict=True):
        assert spaces[0] + "".join(map("".join, zip(words, spaces[1:], strict=True))) == text
        assert not re.sub("(?i)<br ?/?>", "", "".join(spaces)).strip()
    assert lower(typed.values, style).equals(tokenise(array, style).values)
