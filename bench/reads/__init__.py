"""How rows that lie in host memory cross the bus: ways to read them, counted and timed (`bench/lookup_speed.py`)."""
