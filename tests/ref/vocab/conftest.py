"""Fixtures of the vocabulary's tests: tokenizers of a few tokens, and maps that may only come from the cache."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from engram_ref.vocab import compressed


@pytest.fixture
def word_tokenizer(tmp_path):
    """Write a tokenizer.json with exactly these tokens; give back its path."""

    def write(*tokens: str) -> Path:
        file = tmp_path / "tokenizer.json"
        model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
        file.write_text(Tokenizer(model).to_str(), encoding="utf-8")
        return file

    return write


@pytest.fixture
def no_building(monkeypatch):
    """From here on a map can only come from the cache."""

    def forbid() -> None:
        def build(tokenizer):
            raise AssertionError("the map was built again")

        monkeypatch.setattr(compressed, "build_map", build)

    return forbid
