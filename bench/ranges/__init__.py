"""The runs behind the ranges of the answer, one a file (`bench/how_far.py`): endings, tiers, the map, other texts."""
