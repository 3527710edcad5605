"""Tables that ranks share: counted bytes beside times, and the exchange on paper for many ranks.

run        the fetch of real processes, `torchrun ... bench/gpu_wall.py --sharded`
model      latency and bytes of an exchange from published figures, against the window before the second block
schedule   many ranks that wait for each other, step after step, with stragglers
table      what of both stands on a page
figures    and in a figure
"""
