"""How far the devices are that a server waits for, and when it says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from deepfusion.display import duration
from deepfusion.labels import counted

SILENCE_S, MOST_SILENCE_S = 60.0, 3600.0  # between two lines that say the same, at least and at most
CHANGE_S = 5.0  # between two lines that do not: of a thousand devices one has always just come or gone
NAMED = 8  # devices, of those that a line has the same to say of


@dataclass(frozen=True)
class Standing:
    """How far a device is, and of its bytes, if some have come, the share that is here.

    *To mend* is who has said what was wrong, and is soon asked again.
    """

    state: Literal["never connected", "gone", "to mend", "training", "sending", "given up", "accepted", "rejected"]
    share: str = ""


HINT = (  # the server's app cannot see which keys are registered
    "of a device that has never connected: does its flower-supernode run, and is its key registered? "
    "flwr supernode list federation shows those that are"
)
WAITED_FOR = ("sending", "training", "to mend", "gone", "never connected")


def waited_for(standing: Mapping[str, Standing], left: float, *, quorum: bool, most: int = NAMED) -> str:
    """One line on the devices that a server waits for, the time that it still does, and why no longer.

    Args:
        standing: device → how far it is.
        left: seconds until it goes on without those that have not sent.
        quorum: there are enough uploads, and the seconds are those that others are still given.
        most: devices of one state that are named; the others are counted.
    """
    named: list[str] = []
    for state in WAITED_FOR:
        those = [f"{d} {one.share}".strip() for d, one in standing.items() if one.state == state]
        others = f" and {counted(len(those) - most, 'other')}" * (len(those) > most)
        named += [f"{state}: {', '.join(those[:most])}{others}"] if those else []
    waited = sum(one.state in WAITED_FOR for one in standing.values())
    time_left = duration(max(0.0, left))
    until = f"{time_left} more at most, for there is a quorum" if quorum else f"{time_left} until the deadline"
    return f"waiting for {waited} of {counted(len(standing), 'device')}, {until}; {'; '.join(named)}"


class News:
    """Says whom a server waits for: at the beginning, when it changes, and now and then while nothing does."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.states: tuple[str, ...] = ()
        self.at, self.silence, self.hinted = 0.0, SILENCE_S, False

    def tell(self, standing: Mapping[str, Standing], now: float, end: float, *, quorum: bool) -> None:
        """Say it, if it is time to."""
        states = (str(quorum), *(one.state for one in standing.values()))
        if self.states and now - self.at < (self.silence if states == self.states else CHANGE_S):
            return
        # A deadline may be days away: what is said again is said ever less often.
        self.silence = min(2 * self.silence, MOST_SILENCE_S) if states == self.states else SILENCE_S
        if states == self.states and "never connected" in states and not self.hinted:
            self.hinted = True
            self.say(HINT)
        self.states, self.at = states, now
        self.say(waited_for(standing, end - now, quorum=quorum))
