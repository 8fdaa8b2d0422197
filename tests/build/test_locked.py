"""Builds from a lock: the same image everywhere, aged locks, vendored files, and what differs is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import BASE
from workbench.build import lock
from workbench.linux import userns

SMALL = '[base]\nsuite = "bookworm"\n[apt]\npackages = ["hello"]\n[python]\npackages = ["six"]\n'


def written(name: str, text: str = SMALL) -> Path:
    folder = BASE / "recipes" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(f'name = "{name}"\n{text}')
    return folder


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """The home of another, empty store."""
    home = BASE / "elsewhere"
    yield home
    userns.call("workbench.images.layer:remove", str(home))


@pytest.fixture(scope="module")
def original(cli, image) -> Path:
    """A small recipe with its lock, built in the store of all tests."""
    folder = written("locked")
    done = cli("lock", str(folder), "--json")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def locked(original, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "locked"))


@pytest.mark.second
def test_another_machine_makes_the_same_image(cli, locked, elsewhere):
    """Another store, folder, locale, time zone, umask, clock, host name and number of processors; no network at all,
    and addresses that lead nowhere but would leave a mark."""
    vendor = locked / "vendor"
    assert cli("lock", str(locked), "--refresh", "--vendor", str(vendor)).code == 0
    known = lock.load(locked)
    assert {entry.file for step in known.steps for entry in step.packages} <= set(os.listdir(vendor))
    there = BASE / "recipes" / "copied" / "deeper"
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(locked, there)
    here = json.loads(cli("build", str(locked), "--json").out)
    build = f"{sys.executable} -m workbench build {there} --offline --json"
    words = ["sh", "-c", f"umask 077; exec taskset -c 0 {build}"]
    clock = ["faketime", "2031-03-05 11:22:33"]
    apart = ["unshare", "--uts", "--net", "sh", "-c", 'hostname another; exec "$@"', "sh"] if os.geteuid() == 0 else []
    marked = "http://marked-user:marked-word@127.0.0.1:9/marked-index"
    env = {
        "WORKBENCH_HOME": str(elsewhere), "LANG": "de_DE.UTF-8", "LC_ALL": "", "TZ": "Pacific/Auckland",
        "http_proxy": marked, "https_proxy": marked, "UV_DEFAULT_INDEX": marked, "PIP_INDEX_URL": marked,
    }  # fmt: skip
    done = subprocess.run(
        [*apart, *clock, *words], env=os.environ | env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["id"], found["identical"], found["differences"]) == (here["id"], True, [])
    assert ", cached" not in done.stderr
    nothing_of(["marked-user", "marked-word", "marked-index", "127.0.0.1:28549", str(BASE)], elsewhere / "layers")


def nothing_of(marks: list[str], layers: Path) -> None:
    """No layer holds one of these texts."""
    trees = [str(path) for path in layers.iterdir() if path.is_dir()]
    assert userns.call("tests.build.inside:find", trees, marks) == []


def test_offline_names_what_is_not_here(cli, locked, elsewhere, tmp_path):
    done = cli("build", str(locked), "--offline", WORKBENCH_HOME=str(elsewhere))
    assert done.code == 1
    assert re.search(r"step base: adduser \S+ \(all\), sha256 [0-9a-f]{64} \(and \d+ more\), cannot be had", done.err)
    fresh = written("unlocked")
    done = cli("build", str(fresh), "--offline", WORKBENCH_HOME=str(elsewhere))
    assert "no lock says what to take, and nothing may be fetched" in done.err


def aged(folder: Path, name: str) -> dict[str, str]:
    """The recipe's lock names a file of a package that nobody has (any more); the versions before and after."""
    path = folder / lock.FILE
    text = path.read_text()
    line = next(line for line in text.splitlines() if f'name = "{name}", version' in line)
    version = re.search(r'version = "([^"]+)"', line)[1]
    gone = line.replace(version, "0.0.1").replace(
        re.search(r'sha256 = "([^"]+)"', line)[1], hashlib.sha256(b"").hexdigest()
    )
    path.write_text(text.replace(line, gone))
    return {"before": "0.0.1", "after": version}


@pytest.mark.second
def test_what_cannot_be_had_any_more_is_one_line_and_refresh_renews_just_that(cli, locked):
    for name in ("hello", "six"):
        versions = aged(locked, name)
        done = cli("build", str(locked))
        assert done.code == 1
        assert re.search(
            rf"step \w+: {name} 0\.0\.1 \(.*\), sha256 e3b0c4\w+, cannot be had: .*; choose another with", done.err
        )
        done = cli("build", str(locked), "--refresh", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["renewed"] == [f"{name} 0.0.1 -> {versions['after']}"]
        again = cli("build", str(locked), "--refresh", "--json")  # quick, and it says so again
        assert json.loads(again.out)["renewed"] == [f"{name} 0.0.1 -> {versions['after']}"]
        assert "done in" not in again.err
        assert cli("lock", str(locked), "--refresh").code == 0
        assert json.loads(cli("build", str(locked), "--json").out)["identical"]


@pytest.mark.second
def test_a_lock_of_another_recipe_is_refused(cli, locked):
    path = locked / "recipe.toml"
    path.write_text(path.read_text().replace('"hello"', '"hello", "sl"'))
    done = cli("build", str(locked))
    assert done.code == 1
    assert "the recipe says something else in apt; write the lock anew with `jupyter workbench lock`" in done.err
    assert cli("build", str(locked), "--refresh").code == 0


def test_a_layer_that_is_not_the_locks_is_named_with_its_paths(cli, locked):
    path = locked / lock.FILE
    text = path.read_text()
    known = lock.load(locked)
    apt = known.step("apt")
    altered = text.replace(apt.diff_id, "sha256:" + "0" * 64)
    sum_line = next(f'"{name}" = "{value}"' for name, value in apt.sums.items() if name.startswith("usr/bin"))
    path.write_text(altered.replace(sum_line, re.sub(r'"\w{8}"$', '"00000000"', sum_line)))
    done = cli("build", str(locked), "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert not found["identical"]
    assert found["differences"] == [f"step apt differs from the lock in {sum_line.split(chr(34))[1]}"]


class Mirror(SimpleHTTPRequestHandler):
    """A package index that asks for a name and a password."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.headers.get("Authorization", "").startswith("Basic "):
            super().do_GET()
        else:
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            self.end_headers()


def test_no_address_of_an_index_stays(cli, locked, tmp_path):
    """Wheels fetched through an index on this machine, with a name and a password in its address."""
    vendor = tmp_path / "vendor"
    assert cli("lock", str(locked), "--refresh", "--vendor", str(vendor)).code == 0
    root = tmp_path / "www"
    for file in vendor.glob("*.whl"):
        project = root / "marked-index" / file.name.split("-")[0].replace("_", "-")
        project.mkdir(parents=True)
        shutil.copy(file, project)
        (project / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
    home = Path(os.environ["WORKBENCH_HOME"])
    for path in (home / "cache").glob("*.json"):  # the step is to be made again, from files that are fetched again
        known = json.loads(path.read_text())
        if known["step"] == "python" and known["lock"]["asks"] == {"packages": ["six"]}:
            path.unlink()
    for wheel in lock.load(locked).step("python").wheels:
        (home / "cache" / "downloads" / "files" / "sha256" / wheel.sha256).unlink()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Mirror, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://marked-user:marked%20word@127.0.0.1:{server.server_port}/marked-index"
        done = cli("build", str(locked), "--json", UV_DEFAULT_INDEX=address)
        server.shutdown()
    assert done.code == 0, done.err
    assert "python: done in" in done.err
    assert json.loads(done.out)["identical"]
    assert "marked" not in done.err
    nothing_of(["marked-user", "marked-index", f"127.0.0.1:{server.server_port}"], home / "layers")
