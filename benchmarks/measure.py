"""Pairs of measurements taken by turns, and what is said of them.

The two sides of a figure alternate within one run, so that whatever else the machine does hits both. A ratio is the
median of the pairs' ratios, its spread their quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. ours, peer: in ``unit``; peer, ratio and spread are None where there is no peer."""

    figure: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    spread: tuple[float, float]
    goal: str
    holds: bool
    count: int
    against: str = ""


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def by_turns(sides: Sequence[Callable[[], float]], count: int, warm: int = 1) -> list[list[float]]:
    """Each side's ``count`` values, after ``warm`` that do not count; the order turns around with every round."""
    values: list[list[float]] = [[] for _ in sides]
    for number in range(-warm, count):
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for side in order:
            value = sides[side]()
            if number >= 0:
                values[side].append(value)
    return values


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(
    name: str, ours: Sequence[float], peer: Sequence[float], most: float, *, extra: float = 0.0, unit: str = "ms",
    scale: float = 1e3, against: str = "",
) -> Figure:  # fmt: skip
    """Two sides, pair by pair. The goal: ours <= ``most`` times the peer + ``extra`` (in ``unit``), in the median."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    ratio = statistics.median(ratios)
    middle, other = statistics.median(ours) * scale, statistics.median(peer) * scale
    excess = statistics.median((a - most * b) * scale for a, b in zip(ours, peer, strict=True))
    return Figure(
        name, middle, other, unit, ratio, quartiles(ratios),
        f"<= {most:g}" + (f" + {extra:g} {unit}" if extra else ""),
        excess <= extra if extra else ratio <= most,
        len(ratios), against,
    )  # fmt: skip


def bounded(name: str, values: Sequence[float], most: float, unit: str) -> Figure:
    """A figure without a peer: its median is to be at most ``most``."""
    middle = statistics.median(values)
    return Figure(name, middle, None, unit, None, quartiles(values), f"<= {most:g} {unit}", middle <= most, len(values))


def shown(name: str, values: Sequence[float], unit: str) -> Figure:
    """A figure without a peer and without a goal."""
    return Figure(name, statistics.median(values), None, unit, None, quartiles(values), "", True, len(values))
