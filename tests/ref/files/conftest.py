"""Fixtures of reads from files: every way to read, and tables in files; `tests/ref/files/ways.py` has them."""

from tests.ref.files.ways import found, kept, make, way  # noqa: F401 - fixtures
