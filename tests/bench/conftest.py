"""What the tests of benchmarks share."""

import functools
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_tokenizer():
    """Each command reads DeepSeek's, half a second, and encodes the same text with it; nobody changes either."""
    from bench.setup import streams
    from engram_ref.vocab import load_tokenizer

    encode = functools.cache(streams.encode_texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "load_tokenizer", functools.cache(load_tokenizer))
        patch.setattr(streams, "encode_texts", lambda tokenizer, texts: encode(tokenizer, tuple(texts)).copy())
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Triton's interpreter runs one program after the other: each has more rows than a GPU would give it."""
    kernels = sys.modules.get("engram_ref.rows.kernels")
    with pytest.MonkeyPatch.context() as patch:
        if kernels is not None:
            patch.setattr(kernels, "ROWS_PER_PROGRAM", 512)
            patch.setattr(kernels, "SCALED_ROWS_PER_PROGRAM", 512)
        yield
