"""What the demo trains; without torch, so that the command line can name its defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Width:
    """A bit width of the demo and how long it is trained."""

    bits: int
    iterations: int

    @property
    def key(self) -> str:
        """Key in the report, such as `w4a4`."""
        return f"w{self.bits}a{self.bits}"

    @property
    def label(self) -> str:
        """Name in the report, such as `W4A4`."""
        return self.key.upper()


WIDTHS = (Width(4, 150), Width(2, 400))
"""Two bits get more steps: they have more to recover."""
