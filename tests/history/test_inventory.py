"""What an image holds, read from its files; Debian's own tools say the same from inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.history.test_snapshot import Live
from workbench.history import inventory, owners
from workbench.history.inventory import Package
from workbench.images.view import View
from workbench.linux import userns
from workbench.workbench import Workbench

VENV = "root/venv/lib/python3.11/site-packages"
USER = "root/.local/lib/python3.11/site-packages"


@pytest.fixture
def live(workbench: Workbench, image: str) -> Iterator[Live]:
    live = Live(workbench, image)
    yield live
    live.close()


@pytest.mark.parametrize(
    ("said", "origin", "source"),
    [
        (None, "", ""), (b"no json", "", ""), (b"[]", "", ""), (b'{"archive_info": {}}', "", ""),
        (b'{"url": "https://u:p@example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
         "vcs", "git+https://example.org/x.git@abc"),
        (b'{"url": "https://example.org/x.git", "vcs_info": {"vcs": "hg", "requested_revision": "r"},'
         b' "subdirectory": "a/b"}', "vcs", "hg+https://example.org/x.git@r#subdirectory=a/b"),
        (b'{"url": "file:///root/x", "dir_info": {"editable": true}}', "editable", "file:///root/x"),
        (b'{"url": "file:///root/x", "dir_info": {}}', "folder", "file:///root/x"),
        (b'{"url": "https://example.org/x.whl", "archive_info": {"hashes": {"sha256": "12"}}}',
         "url", "https://example.org/x.whl#sha256=12"),
        (b'{"url": "https://example.org/x.whl", "archive_info": {"hash": "sha256=34"}}',
         "url", "https://example.org/x.whl#sha256=34"),
    ],
)  # fmt: skip
def test_direct_urls(said: bytes | None, origin: str, source: str) -> None:
    assert inventory.direct(said) == (origin, source)


def info(place: str, name: str, version: str, installer: str = "pip", url: str = "") -> dict[str, str]:
    """The files of a distribution."""
    folder = f"{place}/{name.replace('-', '_')}-{version}.dist-info"
    module = f"{name.replace('-', '_').lower()}.py"
    record = f"{module},,\n{folder.rpartition('/')[2]}/RECORD,,\n../../../bin/{name},,\n"
    found = {f"{folder}/METADATA": f"Name: {name}\nVersion: {version}\n\nName: no\n", f"{folder}/RECORD": record,
             f"{place}/{module}": "", f"{place}/../../../bin/{name}": "#!"}  # fmt: skip
    return found | {f"{folder}/INSTALLER": installer} | ({f"{folder}/direct_url.json": url} if url else {})


MADE = {
    **info(VENV, "Plain.Thing", "1.0"),
    **info(VENV, "mine", "0.3", url='{"url": "file:///root/mine", "dir_info": {"editable": true}}'),
    **info(VENV, "forge", "2", url='{"url": "https://example.org/f", "vcs_info": {"vcs": "git", "commit_id": "c"}}'),
    "root/venv/pyvenv.cfg": "home = /usr/bin\nversion = 3.11.2\n", "root/venv/bin/activate": "",
    "root/venv/own.txt": "mine",
    **info(USER, "pthed", "4"), f"{USER}/__editable__.pthed-4.pth": "/root/pthed\n",
    f"{USER}/old-style.egg-link": "/root/old\n../",
    "root/old/old_style.egg-info/PKG-INFO": "Name: Old_Style\nVersion: 5\n",
    f"{USER}/legacy-6.egg-info/PKG-INFO": "Name: legacy\nVersion: 6\n",
    f"{USER}/legacy-6.egg-info/top_level.txt": "leg\n",
    f"{USER}/leg/inside.py": "",
    "opt/conda/conda-meta/xz-5.4-h1.json": json.dumps(
        {"name": "xz", "version": "5.4", "channel": "https://t:k@conda.example.org/main", "files": ["bin/xz"]}),
    "opt/conda/bin/xz": "", "opt/conda/bin/stray": "1234",
    **info("opt/conda/lib/python3.12/site-packages", "condas", "7", installer="conda"),
    "usr/local/lib/R/site-library/praise/DESCRIPTION": "Package: praise\nVersion: 1.0.0\nRepository: CRAN\n",
    "usr/local/lib/R/site-library/praise/R/praise": "",
    "root/R/x86_64-pc-linux-gnu-library/4.2/gh/DESCRIPTION":
        "Package: gh\nVersion: 9\nRemoteType: github\nRemoteUsername: a\nRemoteRepo: b\nRemoteSha: s\n",
    "opt/data/a.csv": "12345", "opt/x/__pycache__/a.cpython-311.pyc": "", "etc/ld.so.cache": "x", "root/.cache/x": "x",
}  # fmt: skip


@pytest.fixture
def made(live: Live, workbench: Workbench) -> str:
    """A snapshot with an environment of each kind, by hand."""
    upper = live.container.upper
    live.end()
    userns.call("tests.history.inside:contents", upper, {os.path.normpath(path): text for path, text in MADE.items()})
    live.snapshot("x", name="kinds")
    return "kinds"


def test_every_environment_and_where_its_packages_came_from(made: str, workbench: Workbench) -> None:
    found = workbench.inventory(made)
    rows = {
        (p.name, p.version, p.environment, p.installer, p.origin, p.source) for p in found.packages if p.kind != "deb"
    }
    local, conda = "/root/.local", "/opt/conda"
    assert rows == {
        ("plain-thing", "1.0", "/root/venv", "pip", "index", ""),
        ("mine", "0.3", "/root/venv", "pip", "editable", "file:///root/mine"),
        ("forge", "2", "/root/venv", "pip", "vcs", "git+https://example.org/f@c"),
        ("pthed", "4", local, "pip", "editable", ""), ("old-style", "5", local, "", "editable", "file:///root/old"),
        ("legacy", "6", local, "", "", ""),
        ("xz", "5.4", conda, "conda", "conda", "https://conda.example.org/main"),
        ("condas", "7", conda, "conda", "conda", ""),
        ("praise", "1.0.0", "", "", "CRAN", ""), ("gh", "9", "", "", "github", "a/b@s"),
    }  # fmt: skip
    assert [(one.prefix, one.kind, one.python, one.packages) for one in found.environments] == [
        ("/opt/conda", "conda", "3.12", 1), ("/root/.local", "user", "3.11", 3), ("/root/venv", "venv", "3.11.2", 3),
    ]  # fmt: skip
    frame = found.frame()
    assert frame.loc[frame["origin"] == "editable", "name"].tolist() == ["mine", "old-style", "pthed"]
    assert len(frame) == len(found.packages) and frame["kind"].dtype == "category"


def test_files_that_no_package_owns(made: str, workbench: Workbench) -> None:
    found = workbench.inventory(made, unowned=True).unowned
    assert found is not None
    assert dict(found.files) == {
        "root/venv/own.txt": 4, "opt/conda/bin/stray": 4, "opt/data/a.csv": 5,
        "root/old/old_style.egg-info/PKG-INFO": len(MADE["root/old/old_style.egg-info/PKG-INFO"]),
        f"{USER}/__editable__.pthed-4.pth": 12, f"{USER}/old-style.egg-link": 13,
    }  # fmt: skip
    assert (found.count, found.size) == (len(found.files), sum(size for _, size in found.files))


def test_only_so_many_are_listed(made: str, workbench: Workbench) -> None:
    trees = workbench.store.trees(workbench.image(made).diff_ids)
    found = userns.call("tests.history.inside:unowned", trees, 2)
    assert found["count"] > 30 and len(found["files"]) == 2


def test_diff_tells_the_origin(made: str, workbench: Workbench) -> None:
    found = workbench.diff("lower", made)
    told = {row.name: row.origin for row in found.packages}
    assert told["mine"] == "editable file:///root/mine" and told["plain-thing"] == "" and told["gh"] == "github a/b@s"
    frame = found.frame()
    assert list(frame.columns) == ["kind", "name", "before", "after", "place", "origin"]
    assert frame.groupby("kind", observed=True).size().to_dict() == {"conda": 1, "python": 7, "r": 2}
    files = found.frame("files")
    assert files["grown"].sum() == sum(row.after - row.before for row in found.files)
    assert files.loc[files["path"] == "opt/data/a.csv", "folder"].tolist() == ["/opt/data"]
    nothing = workbench.diff(made, made)
    assert nothing.frame().empty and nothing.frame("files")["grown"].sum() == 0


def test_the_same_version_from_elsewhere_is_a_change(made: str, live: Live, workbench: Workbench, image: str) -> None:
    again = Live(workbench, workbench.image(made).id)
    upper = again.container.upper
    again.end()
    folder = f"{VENV}/Plain.Thing-1.0.dist-info"
    userns.call("tests.history.inside:contents", upper, {
        f"{folder}/direct_url.json": '{"url": "https://example.org/p.whl", "archive_info": {}}',
        f"{folder}/INSTALLER": "uv",
    })  # fmt: skip
    again.snapshot("y", name="kinds2")
    again.close()
    (row,) = workbench.diff(made, "kinds2").packages
    assert (row.name, row.before, row.after, row.origin) == (
        "plain-thing",
        "1.0",
        "1.0",
        "url https://example.org/p.whl",
    )


def test_as_debians_tools_say(workbench: Workbench, image: str, tmp_path: Path) -> None:
    """dpkg-query from inside lists the same packages; dpkg -S knows no owner of what is said to have none."""
    found = workbench.inventory(image, unowned=True)
    assert found.unowned is not None and 0 < found.unowned.count < 60

    def inside(script: str) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "workbench",
            "run",
            "--no-folder",
            "--network",
            "none",
            "lower",
            "sh",
            "-c",
            script,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()

    listed = inside("dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\\n'")
    assert {line.removeprefix("installed ") for line in listed if line.startswith("installed ")} == {
        f"{package.name} {package.version}" for package in found.packages if package.kind == "deb"
    }  # fmt: skip
    paths = [f"/{path}" for path, _ in found.unowned.files]
    assert inside(f"dpkg -S {' '.join(paths)} 2>/dev/null || true") == []
    # and what a list names is owned: every file below /usr/bin but links of update-alternatives
    trees = workbench.store.trees(workbench.image(image).diff_ids)
    owned = userns.call("tests.history.inside:owners_below", trees, "usr/bin")
    said = {}
    for line in inside("dpkg -S '/usr/bin/*' '/bin/*'"):
        names, _, path = line.partition(": ")
        if not line.startswith("diversion"):
            said.setdefault(path.removeprefix("/usr").removeprefix("/bin/"), names.split(", ")[0].partition(":")[0])
    wrong = {name: owner for name, owner in owned.items() if said.get(name, owner) != owner}
    assert not wrong and len(owned) > 200


def test_what_comes_about_by_itself() -> None:
    for path in ("usr/lib/python3/x/__pycache__/a.pyc", "etc/alternatives/awk", "var/lib/dpkg/status",
                 "etc/ld.so.cache", "etc/passwd-", "var/log/dpkg.log", "tmp/x", "root/.bash_history"):  # fmt: skip
        assert owners.by_itself(path), path
    for path in ("etc/passwd", "opt/a", "usr/share/iconset/a", "etc/ld.so.cachex", "home/a/tmp/x", "var/lib/mine/x"):
        assert not owners.by_itself(path), path


def test_plain_packages_have_nothing_to_tell() -> None:
    assert Package("python", "a", "1", "/x", "/x", "pip", "index").told == ""
    assert Package("python", "a", "1", "/x", "/x", "pip", "editable", "file:///a").told == "editable file:///a"
    assert View([]).names("") == []
