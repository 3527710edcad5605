"""Work beside the main thread: what runs it, who still uses a thing, and what a forked child must make anew.

errands   a pool of daemon threads, and work that can be called off
users     who still uses a buffer or a table
forks     what a forked child makes anew
"""
