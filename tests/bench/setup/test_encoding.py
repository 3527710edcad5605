"""A text in pieces has the ids that it has as a whole: real text, and texts that were written against the cuts."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from bench.setup import encoding
from bench.setup.encoding import encode_texts
from bench.setup.streams import text_source
from engram_ref.files.texts import read_text
from engram_ref.vocab import load_tokenizer

PIECE = 700  # characters: a short text has many cuts


@pytest.fixture(scope="module")
def prose():
    return read_text(None)[1][:30_000]


@pytest.fixture(scope="module")
def deepseek():
    return load_tokenizer()


def whole(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def parts(tokenizer, text, piece=PIECE):
    return list(encoding._cut(tokenizer, text, piece))


def mixed(seed):
    """Fragments that pre-tokenizers treat each in its own way, in random order."""
    draw = random.Random(seed)
    fragments = [
        "word",
        " word",
        "\n",
        "\nLine",
        "\n\n",
        " ",
        "   ",
        "\t",
        "\r\n",
        "12345",
        "表格",
        "ñ",
        "e\u0301",
        "👩‍👩‍👧",
        "don't",
    ]
    fragments += [
        "...",
        " (x)",
        "<｜begin▁of▁sentence｜>",
        "\u00a0",
        "\0",
        "a" * 90,
        "Σ",
        "\u200d",
        "ﬁ",
        "_id",
        "'s",
        "ab cd",
    ]
    return "".join(draw.choice(fragments) for _ in range(1_500))


ADVERSARIAL = {
    "one word": "a" * 8_000,
    "no blank": "Abcdefg,hijk;" * 600,
    "blanks": " " * 8_000,
    "line breaks": "\n" * 8_000,
    "blank lines": "some words\n\n\n\n" * 500,
    "digits": "1234567 " * 1_000,
    "ideographs": "表格嵌入" * 2_000,
    "windows": "a line of text\r\n" * 500,
    "indented": "        return x\n" * 500,
    "one blank each": "x y " * 2_000,
    **{f"mixed {seed}": mixed(seed) for seed in range(3)},
}


def test_real_text(deepseek, small_tokenizer, prose):
    for tokenizer in (deepseek, load_tokenizer(small_tokenizer)):
        found = encode_texts(tokenizer, [prose], PIECE)
        assert found.tolist() == whole(tokenizer, prose)
        assert len(parts(tokenizer, prose)) > 30 and max(map(len, parts(tokenizer, prose))) < 3 * PIECE


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_adversarial_text(text, deepseek, small_tokenizer):
    text = ADVERSARIAL[text]
    for tokenizer in (deepseek, load_tokenizer(small_tokenizer)):
        assert encode_texts(tokenizer, [text], PIECE).tolist() == whole(tokenizer, text)
        assert "".join(parts(tokenizer, text)) == text


def trained(pre_tokenizer, prose, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([prose], trainer)
    return tokenizer


OTHERS = {
    "a blank in front of every text": lambda prose: trained(pre_tokenizers.Metaspace(prepend_scheme="always"), prose),
    "a blank in front of the first word": lambda prose: trained(
        pre_tokenizers.Metaspace(prepend_scheme="first"), prose
    ),
    "no words at all": lambda prose: trained(None, prose[:5_000]),
    "whole lines": lambda prose: trained(pre_tokenizers.Split("\n", "merged_with_next"), prose),
    "gpt-2": lambda prose: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), prose),
    "gpt-2, blank in front": lambda prose: trained(pre_tokenizers.ByteLevel(add_prefix_space=True), prose),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_kinds_of_tokenizers(other, prose):
    tokenizer = OTHERS[other](prose)
    text = prose[:6_000]
    assert encode_texts(tokenizer, [text], PIECE).tolist() == whole(tokenizer, text)


def test_a_token_of_several_words_is_not_cut(prose, monkeypatch):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), prose)
    tokenizer.add_tokens([AddedToken("in the table", normalized=False), AddedToken("line\nBreak", normalized=False)])
    text = "this is in the table\nline\nBreak of it " * 60
    pieces = range(200, 240, 4)  # each cuts elsewhere
    assert all(encode_texts(tokenizer, [text], piece).tolist() == whole(tokenizer, text) for piece in pieces)
    monkeypatch.setattr(encoding, "_is_border", lambda *_: True)  # the tokenizer is not asked
    assert any(encode_texts(tokenizer, [text], piece).tolist() != whole(tokenizer, text) for piece in pieces)


def test_several_texts_are_not_joined(deepseek):
    assert encode_texts(deepseek, ["New", "York", "", " York"]).tolist() == [
        *whole(deepseek, "New"),
        *whole(deepseek, "York"),
        *whole(deepseek, " York"),
    ]
    assert encode_texts(deepseek, []).tolist() == []


def test_progress_is_told(deepseek, prose, monkeypatch, capsys):
    encode_texts(deepseek, [prose])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(encoding, "_SECONDS", 0.0)
    encode_texts(deepseek, [prose])
    assert capsys.readouterr().err == "encoding    0.0 million characters of text\n"


# --- reading --------------------------------------------------------------------------------------


def test_a_long_text_is_read_as_far_as_it_is_needed(tmp_path, small_tokenizer, vocab_small):
    path = tmp_path / "long.txt"
    path.write_text("Zoë's tables. " * 1000, encoding="utf-8")
    assert read_text(path, 14_000) == ("long.txt", "Zoë's tables. " * 1000)
    assert read_text(path, 13_999) == ("long.txt, first 13,999 characters", ("Zoë's tables. " * 1000)[:-1])
    with open(path, "ab") as file:
        file.truncate(60 << 30)  # and on for ever
    assert read_text(path, 20_000) == ("long.txt, first 20,000 characters", "Zoë's tables. " * 1000 + "\0" * 6_000)
    source = text_source(path, vocab_small, small_tokenizer, most=20_000)
    assert source.name == "long.txt, first 20,000 characters" and len(source.ids) < 20_000


def test_line_ends_are_those_of_python(tmp_path):
    path = tmp_path / "ends.txt"
    path.write_bytes(b"one\r\ntwo\rthree\nfour\r")
    assert read_text(path)[1] == path.read_text(encoding="utf-8") == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(("content", "at"), [(b"ab\xffcd", 2), (b"abc\xc3", 3), (b"\xe9" * 99, 0)])
def test_bytes_that_are_no_text(tmp_path, content, at):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=rf"is not UTF-8 text \(.* at byte {at}\)"):
        read_text(tmp_path / "t")
