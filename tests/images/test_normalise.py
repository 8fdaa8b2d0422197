"""A recipe step's writable layer, as the kernel's own overlayfs leaves it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from archives import call, listing, make_tar, member

from workbench.model import NOT_ENVIRONMENT, Conflict

CLAMP = 1_700_000_000
BASE = [
    member("etc", b"5", mtime=1), member("etc/same", data=b"same", mtime=10), member("etc/kept", data=b"old", mtime=10),
    member("etc/mode", data=b"x", mtime=10), member("etc/gone", data=b"x", mtime=10),
    member("usr", b"5", mtime=1), member("usr/lib", b"5", mtime=1), member("usr/lib/a", data=b"a", mtime=10),
    member("var", b"5", mtime=1), member("var/log", b"5", mtime=1), member("var/log/old", data=b"log", mtime=10),
    member("tmp", b"5", mode=0o1777, mtime=1), member("link", b"2", linkname="etc", mtime=10),
    member("replaced", b"5", mtime=1), member("replaced/x", data=b"x", mtime=10),
]  # fmt: skip
MIDDLE = [member("usr", b"5", mtime=1), member("usr/.wh.lib"), member("opt", b"5", mtime=1), member("opt/z", data=b"z")]


@pytest.fixture
def lowers(place: Path) -> list[str]:
    """Two layers, highest first: the upper one removed /usr/lib."""
    call("apply", make_tar(place / "base.tar", *BASE), place / "base")
    call("apply", make_tar(place / "middle.tar", *MIDDLE), place / "middle")
    return [str(place / "middle"), str(place / "base")]


def step(place: Path, lowers: list[str], script: str) -> Path:
    """Run a shell script in an overlay over ``lowers``, as root of a namespace; its upper folder."""
    upper, work, merged = place / "upper", place / "work", place / "merged"
    for folder in (upper, work, merged):
        folder.mkdir()
    options = f"lowerdir={':'.join(lowers)},upperdir={upper},workdir={work},userxattr"
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    outer = f"set -e; umask 022; mount -t overlay overlay -o {options} {merged}; cd {merged}; {script}"
    subprocess.run([*unshare, "sh", "-c", outer], check=True)
    return upper


def normalise(place: Path, lowers: list[str], exclude: tuple[str, ...] = NOT_ENVIRONMENT) -> list[str]:
    found = call("normalise", place / "upper", lowers, CLAMP, list(exclude))
    return list(found)


def names(place: Path) -> list[str]:
    call("pack", place / "upper", place / "upper.tar")
    return sorted(name for name in listing(place / "upper.tar") if name != ".")


def test_only_what_changed_stays(place: Path, lowers: list[str]) -> None:
    script = """
      echo new > etc/kept; chmod 600 etc/mode; chmod 600 etc/same; chmod 644 etc/same; rm etc/gone
      touch -m -d @10 link; mkdir -p usr/bin; echo tool > usr/bin/tool
      rm -r replaced; mkdir replaced; echo y > replaced/y
      echo x >> var/log/old; echo y > var/log/new; echo t > tmp/t; mkdir -p root/.cache/pip; echo > root/.cache/pip/x
    """
    upper = step(place, lowers, script)
    assert (upper / "etc/same").exists() and (upper / "tmp").exists()  # or the test shows nothing
    removed = normalise(place, lowers)
    assert names(place) == [
        "etc", "etc/.wh.gone", "etc/kept", "etc/mode", "replaced", "replaced/.wh..wh..opq", "replaced/y",
        "root", "root/.cache", "usr", "usr/bin", "usr/bin/tool",
    ]  # fmt: skip
    assert {"etc/same", "tmp", "tmp/t", "var", "var/log", "var/log/old", "var/log/new", "root/.cache/pip"} <= set(
        removed
    )


def test_opaque_only_over_a_folder(place: Path, lowers: list[str]) -> None:
    """overlayfs may mark each new folder; usr/lib is hidden by a whiteout in between, so nothing is there."""
    upper = step(place, lowers, "mkdir new usr/lib; echo > usr/lib/b; rm -r opt; mkdir opt; mkdir opt/in")
    assert os.getxattr(upper / "opt", "user.overlay.opaque") == b"y"
    for name in ("new", "usr/lib"):  # some kernels and options mark them, some don't
        os.setxattr(upper / name, "user.overlay.opaque", b"y")
    normalise(place, lowers)
    assert names(place) == ["new", "opt", "opt/.wh..wh..opq", "opt/in", "usr", "usr/lib", "usr/lib/b"]
    assert not [
        n for p in [upper, *upper.rglob("*")] for n in os.listxattr(p, follow_symlinks=False) if "opaque" not in n
    ]


def test_times_are_clamped(place: Path, lowers: list[str]) -> None:
    upper = step(
        place, lowers, "mkdir d; touch d/now; touch -d @5.7 d/old; ln -s now d/l; echo > d/x; rm d/x; touch etc/same"
    )
    normalise(place, lowers)
    assert (upper / "d/now").stat().st_mtime_ns == CLAMP * 10**9 == (upper / "d").stat().st_mtime_ns
    assert (upper / "d/old").stat().st_mtime_ns == 5 * 10**9
    assert (upper / "d/l").lstat().st_mtime_ns == CLAMP * 10**9
    assert (upper / "etc/same").exists()  # a new time is a change
    assert upper.stat().st_mtime_ns == CLAMP * 10**9


def test_excluded_paths(place: Path, lowers: list[str]) -> None:
    step(place, lowers, "mkdir -p a/b ab; echo > a/b/c; echo > ab/x; echo > etc/one; echo > etc/two")
    assert normalise(place, lowers, ("a/", "etc/one")) == ["a/b", "etc/one"]
    assert names(place) == ["a", "ab", "ab/x", "etc", "etc/two"]


def test_whiteouts_of_nothing_go(place: Path, lowers: list[str]) -> None:
    call(
        "apply",
        make_tar(place / "u.tar", member(".wh.none"), member("usr/.wh.lib"), member("etc/.wh.kept")),
        place / "upper",
    )
    assert normalise(place, lowers) == ["none", "usr", "usr/lib"]
    assert names(place) == ["etc", "etc/.wh.kept"]


def test_the_merged_view_stays(place: Path, lowers: list[str]) -> None:
    """What the overlay shows over the normalised layer is what it showed before, but times and what is left out."""
    show = "find . -mindepth 1 -type d -printf '%p %m\\n' -o -printf '%p %m %y %s %l\\n' | sort > $OUT"
    script = "rm -r replaced; mkdir replaced; echo y > replaced/y; mkdir usr/lib; echo > usr/lib/q; rm etc/gone"
    script += f"; chmod 700 etc/kept; {show}"
    os.environ["OUT"] = str(place / "before")
    step(place, lowers, script)
    normalise(place, lowers)
    for folder in ("upper", "work", "merged"):
        if folder != "upper":
            call("remove", place / folder)
    (place / "upper").rename(place / "layer")
    os.environ["OUT"] = str(place / "after")
    step(place, [str(place / "layer"), *lowers], show)
    assert (place / "after").read_text() == (place / "before").read_text() and "usr/lib/q" in (
        place / "after"
    ).read_text()


def test_two_runs_give_the_same_bytes(place: Path, lowers: list[str]) -> None:
    digests = []
    for _ in range(2):
        step(
            place, lowers, "mkdir -p new/a; date +%N > var/log/x; echo fixed > new/a/b; chmod 4755 new/a/b; rm etc/gone"
        )
        normalise(place, lowers)
        digests.append(call("pack", place / "upper")["diff_id"])
        for folder in ("upper", "work", "merged"):
            call("remove", place / folder)
    assert digests[0] == digests[1]


def test_a_folder_that_lies_elsewhere_is_told(place: Path, lowers: list[str]) -> None:
    (place / "upper" / "d").mkdir(parents=True)
    os.setxattr(place / "upper/d", "user.overlay.redirect", b"/etc")
    with pytest.raises(Conflict, match="redirect_dir=off"):
        normalise(place, lowers)
