"""A snapshot that somebody made by hand becomes a recipe again: installed by pip and apt in a real container."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.history.test_snapshot import Live
from workbench.build import lock, recipe, written
from workbench.history.freeze import Lost, frozen_name, summary
from workbench.linux import userns
from workbench.model import BuildFailed, Conflict, InvalidInput
from workbench.workbench import Workbench

SCENE = r"""
set -e
python=/opt/venv/bin/python
mkdir -p /root/src/mine; cd /root/src/mine
cat > pyproject.toml <<END
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "My.Own"
version = "0.3"
END
echo 'x = 1' > my_own.py
$python -m pip install -q setuptools six==1.16.0 packaging==25.0
$python -m pip install -q --no-build-isolation -e .
$python -m pip uninstall -q -y ipywidgets
$python -m venv --without-pip /root/venv
$python -m pip -q --python /root/venv/bin/python install six
apt-get -qq update
apt-get -qq -y install --no-install-recommends tree
mkdir -p /opt/data/empty
echo 1 > "/opt/data/it's one.csv"; echo 2 > /opt/data/2.csv; chmod 600 /opt/data/2.csv; ln -s 2.csv /opt/data/latest
printf -- '-----BEGIN PRIVATE KEY-----\n' > /opt/data/key.pem
echo '# mine' >> /etc/deluser.conf
rm /usr/bin/apt-cdrom
useradd -m ann
"""


@pytest.fixture
def scene(cli, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a snapshot over recipes/python; made once, for it takes packages from the mirrors."""
    name = "freeze/scene"
    if Workbench().refs.find(name) is None:
        assert cli("build", "recipes/python", "--refresh", timeout=280).code == 0
        done = cli("run", "--no-folder", "python", "sh", "-c", SCENE, timeout=200)
        assert done.code == 0, done.err + done.out
        container = re.findall(r"container (\w+) stays", done.err)[0]
        assert cli("snapshot", container, "-m", "by hand", "-t", name).code == 0
        cli("rm", "-f", container)
    yield name
    for left in ("freeze/scene-frozen", "freeze/shell-frozen"):
        cli("rmi", left)


@pytest.fixture(scope="module", autouse=True)
def forgotten(cli) -> Iterator[None]:
    yield
    cli("rmi", "freeze/scene")
    cli("gc")


def kinds(lost: list[dict[str, object]]) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for one in lost:
        found.setdefault(str(one["kind"]), []).append(one["name"])
    return found


ANN = ["/home/ann/.bash_logout", "/home/ann/.bashrc", "/home/ann/.profile"]
DATA = ["/opt/data/2.csv", "/opt/data/it's one.csv", "/opt/data/key.pem", "/opt/data/latest"]
SOURCES = ["/root/src/mine/my_own.py", "/root/src/mine/pyproject.toml"]


def test_packages_come_back_and_the_rest_is_told(cli, scene, tmp_path):
    done = cli("freeze", scene, "-o", "frozen", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    said = recipe.load(tmp_path / "frozen")
    assert said.name == "freeze/scene-frozen" and said.base.suite is None
    assert [text.partition("=")[0] for text in said.apt.packages] == ["tree"]
    assert {"packaging==25.0", "six==1.16.0"} < set(said.python.packages) and len(said.python.packages) == 3
    assert "pip uninstall -q -y ipywidgets" in said.run[0].script and said.files == {}
    assert kinds(found["lost"]) == {
        "editable": ["my-own 0.3"], "environment": [f"six {version(cli, scene)}"], "changed": ["/etc/deluser.conf"],
        "users": [f"/etc/{name}" for name in ("group", "gshadow", "passwd", "shadow", "subgid", "subuid")],
        "unowned": [*ANN, *DATA, *SOURCES], "removed": ["/usr/bin/apt-cdrom"],
    }  # fmt: skip
    (packages, all_packages), (files, all_files) = found["packages"], found["files"]
    assert packages == all_packages - 2 and all_files - 60 < files < all_files
    assert sorted(os.listdir(tmp_path / "frozen")) == ["recipe.lock", "recipe.toml"]
    assert sorted(os.listdir(tmp_path)) == ["frozen"]
    # and the recipe says it, too, and is one that gives the same image again
    text = (tmp_path / "frozen" / "recipe.toml").read_text()
    assert "#   1 editable install: my-own 0.3 (from file:///root/src/mine)" in text
    again = cli("build", "frozen", "--json", cwd=tmp_path)
    assert json.loads(again.out)["id"] == found["image"] and json.loads(again.out)["identical"]
    inside = "import packaging, six; print(packaging.__version__, six.__version__)"
    assert cli("run", "--rm", "--no-folder", said.name, "/opt/venv/bin/python", "-c", inside).out == "25.0 1.16.0\n"


def version(cli, scene: str) -> str:
    """Of what the mirror gave for /root/venv."""
    rows = json.loads(cli("inventory", scene, "--json").out)["packages"]
    (row,) = (row for row in rows if row["environment"] == "/root/venv")
    return str(row["version"])


def test_files_go_along_when_asked(cli, scene, tmp_path):
    (tmp_path / "frozen").mkdir()  # an empty folder is as good as none
    done = cli("freeze", scene, "-o", "frozen", "--with-files", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert kinds(found["lost"]) == {
        "users": [f"/etc/{name}" for name in ("group", "gshadow", "passwd", "shadow", "subgid", "subuid")],
        "unowned": [*ANN, "/opt/data/2.csv", "/opt/data/key.pem"],
    }  # fmt: skip
    whys = {one["name"]: one["why"] for one in found["lost"]}
    assert whys["/opt/data/2.csv"] == "its mode is 600" and "private key" in whys["/opt/data/key.pem"]
    # the editable install and the other environment are whole again
    assert found["packages"][0] == found["packages"][1]
    assert found["files"][0] == found["files"][1] - len(found["lost"]) and found["more"] == 0
    script = 'import my_own; print(my_own.__file__, open("/opt/data/it\'s one.csv").read())'
    shown = cli("run", "--rm", "--no-folder", "freeze/scene-frozen", "/opt/venv/bin/python", "-c", script)
    assert shown.out == "/root/src/mine/my_own.py 1\n\n", shown.err
    script = "import os, six; print(six.__version__, os.readlink('/opt/data/latest'))"
    shown = cli("run", "--rm", "--no-folder", "freeze/scene-frozen", "/root/venv/bin/python", "-c", script)
    assert shown.out == f"{version(cli, scene)} 2.csv\n", shown.err
    assert cli("run", "--rm", "--no-folder", "freeze/scene-frozen", "ls", "/usr/bin/apt-cdrom").code != 0
    assert not (tmp_path / "frozen" / "files" / "etc" / "shadow").exists()


def test_so_many_bytes_at_the_most(cli, scene, tmp_path):
    done = cli("freeze", scene, "-o", "f", "--no-build", "--with-files", "--most", "100", "--json", cwd=tmp_path)
    found = json.loads(done.out)
    sizes = [path.stat().st_size for path in (tmp_path / "f" / "files").rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= 100 and found["image"] is None
    assert "it is more than goes along" in {one["why"] for one in found["lost"]}


def test_only_written(cli, scene, tmp_path):
    done = cli("freeze", scene, "--no-build", cwd=tmp_path)
    assert done.code == 0, done.err
    assert sorted(os.listdir(tmp_path / "scene-frozen")) == ["recipe.toml"]
    assert "1 Debian package, 3 Python packages" in done.out and "equal" not in done.out
    assert "not    1 editable install: my-own 0.3" in done.out
    again = cli("freeze", scene, "--no-build", cwd=tmp_path)
    assert again.code == 1 and "is there, and not empty" in again.err and again.err.count("\n") == 1


def test_control_c_leaves_nothing(cli, scene, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", "freeze", scene], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    while "choosing versions" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130
    assert os.listdir(tmp_path) == []


# What no mirror is needed for


@pytest.fixture
def shell(workbench: Workbench, image: str) -> Iterator[Live]:
    """A stopped container over the image ``lower``, which is of no shipped recipe."""
    live = Live(workbench, image)
    live.end()
    yield live
    live.close()


def test_over_an_image_of_ones_own(shell: Live, workbench: Workbench, image: str, tmp_path: Path) -> None:
    userns.call("tests.history.inside:contents", shell.container.upper, {"opt/a": "a\n", "etc/motd": "hello\n"})
    shell.snapshot("x", name="freeze/shell")
    done = workbench.freeze("freeze/shell", str(tmp_path / "f"), with_files=True)
    assert done.base == f"image {image}" and done.lost == () and done.packages[0] == done.packages[1]
    assert done.files[0] == done.files[1] > 5000 and done.taken == 2
    assert done.image is not None and done.image.kernel is not None and done.image.kernel.argv == ("/bin/sh",)
    assert tomllib.loads((tmp_path / "f" / "recipe.toml").read_text())["base"] == {"image": image}
    assert lock.load(tmp_path / "f") is not None
    # what is only of another time is not another file
    assert workbench.diff("freeze/shell", "freeze/shell-frozen").files


def test_nothing_changed(workbench: Workbench, image: str, tmp_path: Path) -> None:
    done = workbench.freeze("lower", str(tmp_path / "f"))
    assert done.image is not None and done.image.diff_ids == workbench.image(image).diff_ids and done.lost == ()


@pytest.fixture
def status(workbench: Workbench, image: str) -> str:
    """What dpkg knows in ``lower``."""
    tree = workbench.store.layer(workbench.image("lower").diff_ids[-1]).as_posix()
    return str(userns.call("tests.history.inside:text", tree, "var/lib/dpkg/status"))


def test_what_no_archive_has_any_more_is_told_and_the_rest_is_made(
    shell: Live, workbench: Workbench, status: str, tmp_path: Path
) -> None:
    """A version of long ago, and a package that never was; beside them a file."""
    said = "".join(
        f"\nPackage: {name}\nStatus: install ok installed\nVersion: {version}\nArchitecture: all\n"
        for name, version in (("made-up", "1.0"), ("tree", "0.0.1-1"))
    )
    files = {
        "var/lib/dpkg/status": status + said, "var/lib/dpkg/info/made-up.list": "/opt\n/opt/tool\n",
        "opt/tool": "mine\n", "opt/data": "mine\n",
    }  # fmt: skip
    userns.call("tests.history.inside:contents", shell.container.upper, files)
    shell.snapshot("x", name="freeze/shell")
    done = workbench.freeze("freeze/shell", str(tmp_path / "f"), with_files=True)
    lost = {(one.kind, one.name): one.why for one in done.lost}
    why = "no archive has it any more"
    assert lost.items() >= {("deb", "made-up 1.0"): why, ("deb", "tree 0.0.1-1"): why}.items()
    assert done.debian == () and done.image is not None and done.packages[0] == done.packages[1] - 2
    assert done.taken == 2  # what came with it goes along as a file
    text = (tmp_path / "f" / "recipe.toml").read_text()
    assert f"#   2 Debian packages: made-up 1.0, tree 0.0.1-1 ({why})" in text
    assert lock.load(tmp_path / "f") is not None
    only = workbench.freeze("freeze/shell", str(tmp_path / "g"), build=False)
    assert only.debian == ("made-up=1.0", "tree=0.0.1-1")


def test_what_no_index_has_any_more_is_told_and_the_rest_is_made(cli, tmp_path: Path) -> None:
    """Versions of long ago in /opt/venv, of a package that is there and of one that never was."""
    assert cli("build", "recipes/python", "--refresh", timeout=280).code == 0
    write = "set -e; cd /opt/venv/lib/python3*/site-packages; for each in made_up:7.1 colorama:0.0.99; do "
    write += "mkdir ${each%:*}-${each#*:}.dist-info; cd ${each%:*}-${each#*:}.dist-info; "
    write += 'printf "Name: ${each%:*}\\nVersion: ${each#*:}\\n" > METADATA; echo pip > INSTALLER; cd ..; done'
    made = cli("run", "--no-folder", "python", "sh", "-c", write)
    container = re.findall(r"container (\w+) stays", made.err)[0]
    try:
        assert cli("snapshot", container, "-m", "x", "-t", "freeze/gone").code == 0
        done = cli("freeze", "freeze/gone", "-o", "f", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert {(one["kind"], one["name"]) for one in found["lost"]} == {
            ("gone", "made-up 7.1"),
            ("gone", "colorama 0.0.99"),
        }
        assert {one["why"] for one in found["lost"]} == {"no index has it any more"}
        assert found["python"] == [] and found["packages"][0] == found["packages"][1] - 2
    finally:
        cli("rm", "-f", container)
        for name in ("freeze/gone", "freeze/gone-frozen"):
            cli("rmi", name)


def test_what_cannot_be_built_leaves_nothing(shell: Live, workbench: Workbench, status: str, tmp_path: Path) -> None:
    """A package was taken away that Debian will not do without."""
    text = re.sub(r"(?m)^Package: base-files\n(?:.+\n)+", "", status)
    userns.call("tests.history.inside:contents", shell.container.upper, {"var/lib/dpkg/status": text})
    shell.snapshot("x", name="freeze/shell")
    with pytest.raises(BuildFailed, match="--no-build"):
        workbench.freeze("freeze/shell", str(tmp_path / "f"))
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_an_address_is_none(shell: Live, workbench: Workbench, tmp_path: Path) -> None:
    """What METADATA says is anybody's text, and a recipe's requirement may be an address that a build fetches."""
    site = "opt/venv/lib/python3.11/site-packages"
    files = {
        f"{site}/{name}-1.dist-info/{file}": text
        for name, said in (("a", "a @ http://localhost:1/a"), ("b", "b"))
        for file, text in (("METADATA", f"Name: {said}\nVersion: 1\n"), ("INSTALLER", "pip"))
    }
    userns.call("tests.history.inside:contents", shell.container.upper, files)
    shell.snapshot("x", name="freeze/shell")
    done = workbench.freeze("freeze/shell", str(tmp_path / "f"), build=False)
    assert done.python == ("b==1",) and [one.why for one in done.lost if one.kind == "folder"]


def test_for_a_stranger_no_address_is_tried(shell: Live, workbench: Workbench, tmp_path: Path) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/a-1-py3-none-any.whl"
    info = "opt/venv/lib/python3.11/site-packages/a-1.dist-info"
    files = {
        f"{info}/METADATA": "Name: a\nVersion: 1\n", f"{info}/INSTALLER": "pip",
        f"{info}/direct_url.json": json.dumps({"url": address, "archive_info": {}}),
    }  # fmt: skip
    userns.call("tests.history.inside:contents", shell.container.upper, files)
    shell.snapshot("x", name="freeze/shell")
    try:
        done = workbench.freeze("freeze/shell", str(tmp_path / "f"), build=False, stranger=True)
        assert done.python == () and [one.name for one in done.lost if one.kind == "url"] == ["a 1"] and asked == []
        done = workbench.freeze("freeze/shell", str(tmp_path / "g"), build=False)
        assert done.python == (f"a @ {address}",) and asked
    finally:
        server.shutdown()
        server.server_close()


def test_refused(workbench: Workbench, image: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(Conflict, match="is there"):
        workbench.freeze("lower", str(tmp_path / "f"))
    with pytest.raises(InvalidInput, match="no number of bytes"):
        workbench.freeze("lower", str(tmp_path / "g"), most="many")
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("plots", "plots-frozen"), ("team/plots:v2", "team/plots-frozen"), ("plots~2", "plots-frozen"),
     ("plots@{1}", "plots-frozen"), ("sha256:" + "a" * 64, "frozen-" + "a" * 12), ("aaaa", "frozen-" + "a" * 12)],
)  # fmt: skip
def test_its_name(text: str, name: str) -> None:
    assert frozen_name(text, "sha256:" + "a" * 64) == name
    assert recipe.parse({"name": name, "base": {"suite": "bookworm"}})


def test_the_text_of_a_recipe() -> None:
    values = {
        "name": "x", "base": {"suite": "bookworm"}, "apt": {"packages": [f"package-{n}" for n in range(30)]},
        "files": {"/a \"b\"'c": "files/a"}, "run": [{"script": "echo 'a'\necho \\ \n"}, {"script": "x '''\ny\n"}],
        "env": {"A": "1"},
    }  # fmt: skip
    text = written.text(values, ["one", "two\nthree = 3"])
    assert tomllib.loads(text) == values
    assert text.startswith("# one\n# two?three = 3\nname") and '\n  "package-3",\n' in text
    with pytest.raises(InvalidInput):
        written.text(values | {"what": 1})


def test_a_line_for_each_kind() -> None:
    lost = [Lost("unowned", f"/{n}", "") for n in range(7)] + [Lost("r", "gh 9", "why")]
    assert list(summary(lost)) == [
        "7 files that no package owns: /0, /1, /2, /3, /4 and 2 more", "1 R package: gh 9 (why)",
    ]  # fmt: skip
    lost = [Lost("url", "a 1", "x"), Lost("url", "b 1", "y")]
    assert list(summary(lost)) == ["2 packages of addresses that cannot be fetched: a 1 (x), b 1 (y)"]
