"""What is made of the output of apt, dpkg, mmdebstrap and uv."""

from __future__ import annotations

import os

import pytest

from workbench.build.news import Counts, Log, explain, missing


def test_counts():
    counts = Counts()
    said = [
        counts.say(line)
        for line in (
            "Get:1 http://deb.debian.org/debian bookworm InRelease [151 kB]",
            "Get:4 http://deb.debian.org/debian bookworm/main amd64 Packages [8790 kB]",
            "Building dependency tree...",
            "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
            "Get:1 http://deb.debian.org/debian bookworm/main amd64 hello amd64 2.10-3 [53.1 kB]",
            "Unpacking openssl (3.0.22-1~deb12u2) ...",
            "Unpacking ca-certificates (20250419~deb12u2) ...",
            "Setting up openssl (3.0.22-1~deb12u2) ...",
            "I: extracting archives...",
            "I: running --customize-hook in shell: sh -c 'x' exec /target",
            "Resolved 42 packages in 602ms",
            "anything else",
        )
    ]
    assert said == [
        "reading the package lists", "", "choosing packages", "", "fetching 1 of 2 (hello)",
        "unpacking 1 of 2 (openssl)", "unpacking 2 of 2 (ca-certificates)", "setting up 1 of 2 (openssl)",
        "unpacking packages", "", "resolved 42 packages in 602ms", "",
    ]  # fmt: skip


EXPLAINED = [
    (["x", "E: Unable to locate package graphvizz"], "Debian bookworm has no package 'graphvizz'"),
    (["E: Package 'x' has no installation candidate"], "Debian bookworm has no package 'x'"),
    (["E: Version '9' for 'curl' was not found"], "Debian bookworm has no version 9 of package 'curl'"),
    (["dpkg: error: cannot write: No space left on device", "E: Sub-process failed"], "no space is left on the disk"),
    (["Err:1 http://x InRelease", "  Temporary failure resolving 'deb.debian.org'"], "the name deb.debian.org cannot"),
    (["error: x", "Because a was not found in the package registry and you require a,"], "no Python package 'a'"),
    (
        ["  × No solution found when resolving dependencies:", "  ╰─▶ Because there is no version of six==99.1 and",
         "      you require six==99.1, we can conclude that your requirements are unsatisfiable."],
        "there is no version six==99.1",
    ),
    (
        ["  ╰─▶ Because python-dateutil>=2.9 depends on six>=1.5 and you require", "      six<1.5 and",
         "      python-dateutil>=2.9, we can conclude that your requirements are unsatisfiable."],
        "six<1.5 and python-dateutil>=2.9 do not go together",
    ),
    (["first", "E: something new", "last"], "E: something new"),
    (["first", "last"], "last"),
    ([], "it ended without a word"),
]  # fmt: skip


MISSING = [
    (
        ["E: Version '9' for 'curl' was not found", "x", "E: Unable to locate package a",
         "E: Version '1:2' for 'b' was not found"],
        ("curl=9", "b=1:2", "a"),
    ),
    (EXPLAINED[6][0], ("six==99.1",)),
    (["  ╰─▶ Because made-up was not found in the", "      package registry and you require x, we"], ("made-up",)),
    (["  ╰─▶ Because only a<=3 is available and you require", "      a==4, we can conclude"], ("a==4",)),
    (EXPLAINED[7][0], ()), ([], ()),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "names"), MISSING, ids=[str(names) for _, names in MISSING])
def test_what_nobody_has(lines, names):
    assert missing(lines) == names


@pytest.mark.parametrize(("lines", "said"), EXPLAINED, ids=[said for _, said in EXPLAINED])
def test_what_stood_in_the_way(lines, said):
    assert said in explain(lines, "bookworm")[0]


def test_a_log_keeps_everything_and_tells_little(tmp_path):
    said = []
    with Log(str(tmp_path / "log"), "apt", said.append) as log:
        for number in range(1000):
            os.write(log.writing, f"\x1b[1mSetting up package{number} (1) ...\x1b[0m\r\n".encode())
        os.write(log.writing, b"no end of line")
    assert (tmp_path / "log").read_bytes().count(b"Setting up") == 1000
    assert said[0] == "  apt: setting up 1 (package0)"
    assert len(said) < 5
    assert log.tail[-1] == "no end of line"
    assert log.tail[-2] == "Setting up package999 (1) ..."
