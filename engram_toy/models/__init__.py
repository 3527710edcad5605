"""What is priced.

layouts     where the table lies: resident, naive, prefetched, hot
endings     what becomes of the rows that a lookup delivers
cuts        how small a preset's table becomes
programs    how much of the model is priced: lookup, layer, block
attention   the rest of the block
kv_bank     the control: a bank of keys and values that all have to be read
"""
