"""Tests of engram_ref.rows."""
