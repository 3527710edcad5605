"""Rows that other processes own: who owns which, how they are asked for, and what all ranks decide together.

plan        which rank owns which rows, and the bytes that an exchange must move
on_paper    how long an exchange takes over a link, by published figures; without torch
routing     from row numbers to the owners, and from their answers back to the order that was asked for
agreement   what went wrong on one rank goes wrong on all of them; plans are compared
exchange    the collectives of `torch.distributed`, counted

`engram_ref.tables.sharded` makes a table of it.
"""
