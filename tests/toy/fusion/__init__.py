"""Tests of engram_toy.fusion."""
