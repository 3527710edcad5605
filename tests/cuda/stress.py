"""How long the stress tests are: whole where there is time, shorter where ENGRAM_STRESS_STEPS says so."""

import os


def steps(whole: int) -> int:
    """Steps of a stress test that has `whole` of them; ENGRAM_STRESS_STEPS, a positive number, is the most.

    Raises:
        ValueError: it is no positive number.
    """
    said = os.environ.get("ENGRAM_STRESS_STEPS", "")
    if not said:
        return whole
    if not said.isdigit() or int(said) < 1:
        raise ValueError(f"ENGRAM_STRESS_STEPS={said!r} must be a positive number of steps, such as 1000")
    return min(whole, int(said))
