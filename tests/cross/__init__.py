"""Tests that hold the twin and the reference against each other."""
