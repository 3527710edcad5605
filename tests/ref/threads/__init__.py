"""Tests of engram_ref.threads."""
