"""Whoever reads a table of results finds what its columns mean on the same page, not in a command's --help."""

from __future__ import annotations

import re

import pytest

from bench.fill_docs import BLOCK, DOCUMENTS, ROOT

# Heads that need no words beside them: what a line is of.
PLAIN = set("model table text texts tokens stream layout variant boundary sweep definition kind case device machine steps".split())
