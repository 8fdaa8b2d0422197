"""What a layer takes of memory while it is laid out, by the number of its files: an archive may hold a million."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images.archives import make_tar, member
from workbench.linux import userns

FEW, MORE = 500, 2500

Member = tuple[tarfile.TarInfo, bytes]

#: How a member is made of its number, and how many bytes of memory one of them may cost.
MANY: dict[str, tuple[Callable[[int], Member], int]] = {
    "files": (lambda number: member(f"d/{number:07}"), 80),
    "folders": (lambda number: member(f"{number:07}/", tarfile.DIRTYPE), 80),
    "folders that nobody names": (lambda number: member(f"{number:07}/.wh..wh..opq"), 80),
    "folders in folders": (lambda number: member(f"{number % 50:07}/{number:07}", tarfile.DIRTYPE), 10),
    "folders with attributes": (
        lambda number: member(f"{number:07}", tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.user.x": "y" * 500}), 80,
    ),
    "whiteouts": (lambda number: member(f".wh.{number:07}"), 80),
    "whiteouts of folders": (
        lambda number: member(f".wh.{number // 2:07}") if number % 2 else member(f"{number // 2:07}", tarfile.DIRTYPE),
        80,
    ),
    "files with two names": (
        lambda number: member(f"{number:07}", tarfile.LNKTYPE, linkname=f"{number - 1:07}") if number % 2
        else member(f"{number:07}"), 150,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MANY)
def test_what_a_member_takes(case: str, place: Path) -> None:
    make, most = MANY[case]
    held = {}
    for count in (FEW, MORE):
        source = make_tar(place / f"{count}.tar", *(make(number) for number in range(count)))
        paths = os.fspath(source), os.fspath(place / f"tree{count}")
        held[count] = userns.call("tests.images.archives:held", *paths, apart=True)  # it changes its process
    each = (held[MORE] - held[FEW]) / (MORE - FEW)
    print(f"{case}: {held[FEW] >> 10} KiB, and {each:.0f} bytes for each of {MORE - FEW} more")
    assert each < most, case
