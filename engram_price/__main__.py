"""`python -m engram_price --text FILE`: the ByteDMD price of the lookups of a text."""

from engram_price.command import run

if __name__ == "__main__":
    run()
