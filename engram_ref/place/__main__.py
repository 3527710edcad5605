"""Where should my table live? `python -m engram_ref.place --preset v41-flash`, or, installed, `engram-place`."""

from engram_ref.starting import interruptible


def run() -> None:
    """The console script."""
    interruptible("engram-place")
    from engram_ref.place import command  # takes a while, in which Ctrl-C is answered already

    command.run()


if __name__ == "__main__":
    run()
