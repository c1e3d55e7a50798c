"""Which instruction sets the run really executed, for the last lines of a test run."""

RAN: dict[str, str] = {}
"""isa -> "native", "emulated", both, or the reason why it did not run."""


_REALLY = ("native", "emulated", "native and emulated")


def ran(isa: str, how: str) -> None:
    """Notes that tests of `isa` ran "native" or "emulated", or why they did not; what ran outlives a reason."""
    before = RAN.get(isa)
    if before in _REALLY and how in _REALLY:
        RAN[isa] = before if before == how else "native and emulated"
    elif before is None or how in _REALLY:
        RAN[isa] = how


def lines() -> list[str]:
    """One line an instruction set."""
    return [f"native {isa:<12} {how}" for isa, how in RAN.items()]
