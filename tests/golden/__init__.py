"""Data from independent implementations; see README.md."""
