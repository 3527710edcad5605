"""A call from the GPU to the CPU: a captured step asks for its rows while it runs, and waits where it needs them.

call        both sides of it, and what becomes of a call that nobody answers
kernels     the GPU's side, in Triton
words       the words of memory by which they tell each other
"""
