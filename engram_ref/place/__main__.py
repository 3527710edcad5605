"""Where should my table live? `python -m engram_ref.place --preset v41-flash`, or, installed, `engram-place`."""

from engram_ref.starting import interruptible


def run() -> None:
    """The console script."""
    interruptible("engram-place")
    from engram_ref import cli
    from engram_ref.place import command  # takes a while, in which Ctrl-C is answered already

    cli.run(command.main, command.PROG)


if __name__ == "__main__":
    run()
