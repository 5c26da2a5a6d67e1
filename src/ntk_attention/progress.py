"""What long work tells of itself while it runs."""

from typing import Protocol


class Reporter(Protocol):
    """Shows the stages of a piece of work, such as a progress bar."""

    def stage(self, text: str, total: int | None = None) -> None:
        """A stage of `total` steps begins; of an unknown number with None."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """n more steps of the stage are done; figures are shown beside them by name."""

    def say(self, text: str) -> None:
        """A line that stays, whatever stage comes next."""


class Silent:
    """A reporter that shows nothing."""

    def stage(self, text: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1, **figures: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass


SILENT = Silent()
