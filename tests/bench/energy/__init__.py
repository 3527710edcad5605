"""Tests of `bench.energy`."""
