"""Tests, one folder per package; `cross` holds what both twins must agree on."""
