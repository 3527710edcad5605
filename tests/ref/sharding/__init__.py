"""Tests of `engram_ref.sharding`."""
