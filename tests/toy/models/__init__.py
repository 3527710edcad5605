"""Tests of engram_toy.models."""
