"""Tests of engram_toy.tracer."""
