"""The guides: their examples run from top to bottom, one after the other."""
