"""`python -m engram_price --text FILE`, or, installed, `engram-price`: the ByteDMD price of the lookups of a text."""

from engram_ref.starting import interruptible


def run() -> None:
    """The console script."""
    interruptible("engram-price")
    from engram_price import command
    from engram_ref import cli

    cli.run(command.main, command.PROG)


if __name__ == "__main__":
    run()
