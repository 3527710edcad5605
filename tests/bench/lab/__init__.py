"""Tests of `bench.lab`."""
