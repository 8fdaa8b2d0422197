"""Several pieces of work, and the end of all of them."""

from __future__ import annotations

import threading
import time

import pytest

from workbench.images import together


class Enough(Exception):
    pass


def test_all_are_run_and_told():
    done: list[int] = []
    told: list[int] = []
    together.run([lambda go_on, number=number: done.append(number) for number in range(20)], told.append)
    assert sorted(done) == list(range(20))
    assert told == sorted(told) and told[0] == 0


@pytest.mark.parametrize("whose", ["a piece", "who waits"])
def test_one_error_ends_them_all(whose):
    begun, ended = [], []

    def endless(go_on):
        begun.append(1)
        try:
            while True:
                go_on()
                time.sleep(0.01)
        finally:
            ended.append(1)

    def broken(go_on):
        raise Enough

    def enough(number):
        if begun:
            raise Enough

    pieces = [broken, *[endless] * 10] if whose == "a piece" else [endless] * 10
    with pytest.raises(Enough):
        together.run(pieces, enough if whose == "who waits" else lambda number: None)
    assert len(begun) == len(ended) < 10  # nobody began anew
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("workbench-piece")]
