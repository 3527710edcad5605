"""Rows on disk, in safetensors files; nothing is mapped, so that a table may be larger than all memory.

header        the raw header, validated; without torch
validated     the same as tensors, bound to the state of the file
conventions   names, marks and dtypes
stored_rows   the rows of a table in one file or two
read_plan     which bytes to read for some rows
row_reader    batched, sorted reads of them; row_reader_fused: compiled
direct_reads  whole blocks past the page cache, many at a time
writing       rows to a file
pagecache     what of a file is in memory
replacing     a file that is there whole or not at all; without torch
small_files   a small file read whole, or refused; without torch
texts         a text to look up: a file, standard input or Python's help topics; without torch
"""
