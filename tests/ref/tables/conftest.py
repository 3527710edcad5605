"""Fixtures of tables: in files, by every way to read them; `tests/ref/files/ways.py` has them."""

from tests.ref.files.ways import found, kept, make, way  # noqa: F401 - fixtures
