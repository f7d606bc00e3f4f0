"""Whom a server says that it waits for, and when."""

from __future__ import annotations

from deepfusion.federation.news import CHANGE_S, HINT, News, Standing, waited_for


def stood(**states: str) -> dict[str, Standing]:
    return {device: Standing(*state.split("|")) for device, state in states.items()}  # pyright: ignore


def test_a_line_names_all_that_are_waited_for_and_the_time_left() -> None:
    standing = stood(a="accepted", b="sending|34%", c="training", d="gone|5%", e="never connected", f="never connected")
    told = waited_for(standing, 604_000, quorum=False)
    assert told == (
        "waiting for 5 of 6 devices, 6 d 23 h until the deadline; sending: b 34%; training: c; gone: d 5%; "
        "never connected: e, f"
    )
    told = waited_for(stood(a="accepted", b="given up", c="rejected", d="training"), 599, quorum=True)
    assert told == "waiting for 1 of 4 devices, 9 min 59 s more at most, for there is a quorum; training: d"


def test_a_line_about_a_large_fleet_names_a_few_and_counts_the_others() -> None:
    told = waited_for(stood(**{f"d{n}": "training" for n in range(1000)}), 60, quorum=False)
    assert told.endswith("; training: d0, d1, d2, d3, d4, d5, d6, d7 and 992 others")
    assert ": d0, d1 and 1 other" in waited_for(stood(d0="gone", d1="gone", d2="gone"), 60, quorum=False, most=2)


def test_whom_a_server_waits_for_is_said_at_once_when_it_changes_and_ever_less_often_while_it_does_not() -> None:
    said: list[str] = []
    news = News(said.append)
    at: list[int] = []
    for now in range(500):
        standing = stood(north="never connected" if now < 10 else f"sending|{now // 10}%")
        before = len(said)
        news.tell(standing, now, 1000, quorum=False)
        at += [now] * (len(said) - before)
    assert at == [0, 10, 70, 190, 430]  # bytes alone are no news: they have lines of their own
    restless: list[str] = []
    news = News(restless.append)
    for now in range(100):
        news.tell(stood(north="gone" if now % 2 else "training"), now, 1000, quorum=False)
    assert len(restless) == 100 / CHANGE_S
    assert said[2] == "waiting for 1 of 1 device, 15 min 30 s until the deadline; sending: north 7%"


def test_what_may_be_wrong_with_a_device_that_never_connects_is_said_once() -> None:
    said: list[str] = []
    news = News(said.append)
    for now in range(500):
        news.tell(stood(north="never connected"), now, 1000, quorum=False)
    assert [line for line in said if not line.startswith("waiting for")] == [HINT]
    assert said.index(HINT) == 1
    assert "flwr supernode list federation" in HINT
