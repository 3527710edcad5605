"""Tests of engram_toy."""
