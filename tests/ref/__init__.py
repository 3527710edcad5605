"""Tests of engram_ref."""
