"""What results files hold: typed records, checked by mypy where they are written, and as JSON schemas where read."""
