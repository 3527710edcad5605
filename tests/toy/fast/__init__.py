"""Tests of engram_toy.fast."""
