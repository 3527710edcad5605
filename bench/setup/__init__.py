"""What is measured: streams of tokens, tables and their content, variants of placement, lookups, decoders."""
