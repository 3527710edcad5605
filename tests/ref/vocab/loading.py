"""What tests of the vocabulary share: the normaliser with steps left out, and a Hub that is not asked."""

import sys
import types

from tokenizers import Regex, normalizers


def steps_without(*left_out: str) -> normalizers.Sequence:
    """The normaliser with some of its steps left out."""
    steps = {
        "nfkc": normalizers.NFKC(),
        "nfd": normalizers.NFD(),
        "accents": normalizers.StripAccents(),
        "lowercase": normalizers.Lowercase(),
        "white": normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        "lone space": normalizers.Replace(Regex(r"^ $"), "\ue000"),
        "strip": normalizers.Strip(),
        "back": normalizers.Replace("\ue000", " "),
    }
    return normalizers.Sequence([step for name, step in steps.items() if name not in left_out])


def fake_transformers(monkeypatch, from_pretrained) -> None:
    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", fake)
