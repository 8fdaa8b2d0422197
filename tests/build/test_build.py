"""Real builds: cached, the same elsewhere, refused in one line, ended at any point without a trace."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import BASE, RECIPE
from workbench.build import builder, bytecode, lock
from workbench.build.cache import Cache
from workbench.containers.container import Containers
from workbench.containers.host_settings import APT_SOURCES, apt_sources, discover
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.linux import userns
from workbench.model import BuildFailed, Settings

pytestmark = pytest.mark.usefixtures("image")

BOOKWORM = '[base]\nsuite = "bookworm"\n[apt]\npackages = ["ca-certificates"]\n'


def written(name: str, more: str = "", base: str = BOOKWORM) -> str:
    """A recipe's folder."""
    folder = BASE / "recipes" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(f'name = "{name}"\n{base}{more}')
    return str(folder)


class Bench:
    """A store and what builds into it, in this process."""

    def __init__(self, home: Path) -> None:
        self.store, self.refs = Store(home).open(), Refs(home)
        self.containers = Containers(str(home))
        self.lines: list[str] = []

    def make(self, folder: str, settings: Settings | None = None, **options) -> builder.Built:
        self.lines.clear()
        return builder.build(
            Path(folder), store=self.store, refs=self.refs, containers=self.containers, progress=self.lines.append,
            settings=lambda suite: settings or discover(suite=suite or None), options=builder.Options(**options),
        )  # fmt: skip

    def build(self, folder: str, settings: Settings | None = None, **options):
        """The image alone."""
        return self.make(folder, settings, **options).image


@pytest.fixture
def bench(home) -> Iterator[Bench]:
    bench = Bench(home)
    yield bench
    bench.containers.close()


@pytest.fixture
def elsewhere() -> Iterator[Bench]:
    """Another, empty store."""
    home = BASE / "elsewhere"
    bench = Bench(home)
    yield bench
    bench.containers.close()
    userns.call("workbench.images.layer:remove", str(home))


@pytest.mark.alone
def test_a_second_build_takes_every_step_from_the_cache(bench, image):
    began = time.monotonic()
    assert bench.build(str(RECIPE), lock=lock.load(RECIPE), refresh=True).id == image
    assert time.monotonic() - began < 5
    assert [line.partition(":")[0] for line in bench.lines] == ["base", "apt", "python"]
    assert all(", cached (" in line for line in bench.lines)


def test_the_image_is_what_the_recipe_promises(cli, image):
    done = cli("run", image, str(RECIPE / "verify"), cwd=RECIPE)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("python 3.11")


def test_a_kernels_start_writes_nothing_into_the_image(cli, image, tmp_path):
    code = "import IPython, ipykernel.kernelapp, ipykernel.ipkernel, pandas, ipywidgets, sys; sys.exit(0)"
    done = cli("run", image, "/opt/venv/bin/python", "-c", code, cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(cli("ps", "--all", "--json").out) == []  # one with changes would stay


def test_the_kernel_stands_in_the_config(bench, image):
    found = bench.store.image(image)
    assert found.kernel is not None
    assert found.kernel.argv[0] == "/opt/venv/bin/python"
    assert found.kernel.supported_encryption == ("curve",)
    assert dict(found.env)["PATH"].startswith("/opt/venv/bin:")
    assert dict(found.labels) == {"org.jupyter.workbench.suite": "bookworm"}


@pytest.mark.first
def test_bytecode_of_a_wheel_is_compiled_once_and_the_same(bench, home):
    """One package more takes that of the others from an earlier build, to the same image as without."""
    apt = '[base]\nsuite = "bookworm"\n[apt]\npackages = ["python3"]\n[python]\npackages = {}\n'

    def built(name: str, *packages: str) -> str:
        return bench.build(written(name, base=apt.format(json.dumps(["pip", *packages])))).id

    def forget() -> None:
        for path in (home / "cache").glob("*.json"):
            if "toolz" in json.loads(path.read_text())["lock"]["asks"].get("packages", ()):
                path.unlink()

    kept = home / "cache" / "downloads" / "files" / "bytecode"
    one = built("one", "six")
    place = bytecode.place(kept, bench.store.image(one).diff_ids[:-1])
    (six,) = [path for path in place.iterdir() if "/six" in zipfile.ZipFile(path).namelist()[0]]
    first = built("two", "six", "toolz")
    forget()
    # What is kept is used: with other bytes in it, another image comes out.
    whole = six.read_bytes()
    six.write_bytes(whole.replace(b"six", b"SIX"))
    assert built("two", "six", "toolz") != first
    forget()
    shutil.rmtree(place)
    assert built("two", "six", "toolz") == first
    assert six.read_bytes() == whole  # made anew


@pytest.mark.first
def test_addresses_of_mirrors_leave_no_trace(bench, monkeypatch):
    """Other addresses of the same archives, as a host behind a mirror has them; in no cache, and never locked."""
    again = random.randint(2, 999)
    text = f'[base]\nsuite = "bookworm"\n[apt]\npackages = {json.dumps(["hello"] * again)}\n'
    plain = bench.build(written("plain", base=BOOKWORM.replace("ca-certificates", "hello")))
    mirrors = {
        "debian": "http://deb.debian.org:80/./debian",
        "security": "http://security.debian.org:80/./debian-security",
    }
    settings = discover(suite="bookworm")
    settings = replace(
        settings,
        env=(*settings.env, ("no_proxy", "marked.example")),
        mirrors=tuple(mirrors.items()),
        texts=(*settings.texts, (APT_SOURCES, apt_sources("bookworm", mirrors))),
    )
    found = bench.make(written("mirrored", base=text), settings)
    assert found.image.diff_ids == plain.diff_ids
    assert "org:80" not in lock.write(found.lock)
    layers = [str(bench.store.layer(diff_id)) for diff_id in found.image.diff_ids]
    marks = ["org:80", "marked.example", "run/workbench", str(BASE), os.uname().nodename + "\n"]
    assert userns.call("tests.build.inside:find", layers, [mark for mark in marks if len(mark) > 4]) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root has all ids; the unprivileged part builds with one")
def test_a_user_without_an_id_range_builds_and_runs(cli, elsewhere, monkeypatch):
    monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    image = elsewhere.build(written("bare", base='[base]\nsuite = "bookworm"\n'))
    elsewhere.refs.set("bare", image.id)
    done = cli("run", "bare", "sh", "-c", "id -u; dpkg --audit; stat -c %u /var/cache/apt/archives/partial",
               WORKBENCH_HOME=str(BASE / "elsewhere"))  # fmt: skip
    assert (done.code, done.out.split()) == (0, ["0", "0"]), done


REFUSED = [
    ("apt", "nodeb", '[apt]\npackages = ["graphvizz"]', "Debian bookworm has no package 'graphvizz'"),
    ("apt", "nodebver", '[apt]\npackages = ["curl=9.9"]', "Debian bookworm has no version 9.9 of package 'curl'"),
    ("python", "nopy", '[python]\npackages = ["pandass-not-there"]', "there is no Python package 'pandass-not-there'"),
    ("python", "nopyver", '[python]\npackages = ["six==99.1"]', "there is no version six==99.1"),
    ("python", "clash", '[python]\npackages = ["six<1.10", "python-dateutil>=2.9", "six>=1.16"]', "do not go together"),
]


@pytest.mark.second
@pytest.mark.parametrize(("step", "name", "more", "said"), REFUSED, ids=[each[1] for each in REFUSED])
def test_what_cannot_be_had_is_one_line_with_a_log(bench, step, name, more, said):
    base = '[base]\nsuite = "bookworm"\n' if step == "apt" else BOOKWORM
    folder = written(name, more, base)
    with pytest.raises(BuildFailed) as caught:
        bench.build(folder)
    text = str(caught.value)
    assert text.startswith(f"build {name}, step {step}: ")
    assert said in text
    assert "\n" not in text
    assert any(line.startswith("  | ") for line in bench.lines)
    log = re.search(r"its log is ([^;\s]+)", text)
    assert log
    assert Path(log[1]).read_text()
    assert name + ":latest" not in bench.refs.all()
    assert bench.store.check(deep=False) == []


def test_what_has_no_wheel_is_built_from_source(bench):
    bench.build(written("sdist", f'[python]\npackages = ["docopt!=0.0.{random.randint(1, 10**9)}"]'))
    assert any("building wheel from source" in line for line in bench.lines)


@pytest.mark.first
def test_a_failed_base_says_why(elsewhere):
    """The host's settings are wrong: nothing is reached, and nothing of it stays."""
    settings = discover(suite="bookworm")
    settings = replace(settings, env=(*settings.env, ("http_proxy", "http://127.0.0.1:9")))
    with pytest.raises(BuildFailed, match=r"step base: .*(cannot be reached|cannot be resolved|127\.0\.0\.1)"):
        elsewhere.build(written("nobase", base='[base]\nsuite = "bookworm"\n'), settings, epoch=1)
    assert list((elsewhere.store.home / "tmp").iterdir()) == []


def start(folder: str, home: Path) -> subprocess.Popen[str]:
    """``build`` in a process of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "workbench", "build", folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"WORKBENCH_HOME": str(home), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str) -> list[str]:
    """What it says up to a line that matches."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if re.search(pattern, line):
            break
    return said


def clean(home: Path) -> bool:
    """Whether a store that is opened again holds no staging, no lock and no problem."""
    store = Store(home).open()
    left = [path for path in (home / "tmp").iterdir() if not path.name.endswith(".lease")]
    return not left and store.check(deep=False) == []


def settled(home: Path) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if clean(home):
            return True
        time.sleep(0.1)
    return False


def test_two_builds_at_once_make_each_step_once(home, cli):
    folder = written("twins", f'[python]\npackages = ["six==1.16.0", "six!=0.0.{random.randint(1, 10**9)}"]')
    processes = [start(folder, home) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("python: done in" in text for text in said) == 1
    assert sum(bool(re.search(r"python: .*, cached", text)) for text in said) == 1
    assert len({row["id"] for row in json.loads(cli("images", "--json").out) if "twins:latest" in row["names"]}) == 1


def fresh_apt() -> str:
    """A step that is in no cache yet, also where the store is kept between runs: the same package, n times."""
    return f'[base]\nsuite = "bookworm"\n[apt]\npackages = {json.dumps(["hello"] * random.randint(2, 999))}\n'


def test_ctrl_c_ends_the_running_step_and_keeps_the_ones_before(home):
    folder = written("stopped", base=fresh_apt())
    process = start(folder, home)
    until(process, r"apt: reading")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in rest
    assert settled(home)
    again = start(folder, home)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0
    assert re.search(r"base: .*, cached", said)
    assert "apt: done in" in said


@pytest.mark.parametrize("pause", [0.0, 0.0001, 0.0003, 0.001])
def test_ctrl_c_pressed_again_and_again_ends_it_too(home, pause):
    folder = written("impatient", '[[run]]\nscript = "echo Resolved it; sleep 1000"\n')
    process = start(folder, home)
    until(process, "run-1: resolved")
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)
    assert settled(home)


# Two quick recipes, so that ten kills take seconds: one up to its Debian packages, one up to Python's.
POINTS = {
    "apt": ["", "apt: choosing", "apt: reading", r"apt: \d+ Debian", "fetching|apt: reading", "apt: keeping"],
    "python": ["python: choosing", "python: 1", "python: (resolved|prepared|installed)", "python: keeping"],
}


@pytest.mark.parametrize("step", POINTS)
def test_kill_9_at_any_point_leaves_a_clean_store(home, step):
    unlike = f'[python]\npackages = ["attrs!=0.0.{random.randint(1, 10**9)}"]'
    folder = written(f"killed-{step}", unlike if step == "python" else "", fresh_apt() if step == "apt" else BOOKWORM)
    for point in POINTS[step]:
        process = start(folder, home)
        if point:
            until(process, point)
        else:
            time.sleep(0.1)
        process.kill()
        process.communicate(timeout=20)
        assert settled(home), f"killed after {point!r}"
    process = start(folder, home)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


def test_gc_drops_what_was_fetched_but_not_under_a_build(bench, image):
    cache = Cache(bench.store.home)
    bench.build(written("cached", f'[python]\npackages = ["six!=0.0.{random.randint(1, 10**9)}"]'))
    files = bench.store.home / "cache" / "downloads" / "files"
    assert any((files / "uv").iterdir())
    assert any((files / "sha256").iterdir())
    with cache.downloads():
        assert Cache(bench.store.home).drop_downloads() == 0
    assert cache.drop_downloads() > 10_000
    assert not files.exists()


def test_kill_9_in_the_base(elsewhere):
    home = elsewhere.store.home
    folder = written("killedbase", base='[base]\nsuite = "trixie"\n')
    process = start(folder, home)
    until(process, r"base: (installing|cleaning)")
    process.kill()
    process.communicate(timeout=20)
    assert settled(home)
    assert elsewhere.store.layers() == []
