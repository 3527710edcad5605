"""Tests of engram_price."""
