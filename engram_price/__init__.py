"""`engram-price`: what does a text's lookup cost in ByteDMD? Where the twins meet: one reads, the other prices."""
