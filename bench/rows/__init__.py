"""Tables of published size: every row read priced, against the weights of whole models (`bench/production.py`)."""
