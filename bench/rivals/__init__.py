"""What others do with the same rows: EngramDB, fio, the demo's own layer (`bench/layer_speed.py`)."""
