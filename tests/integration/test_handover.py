"""Two people on one machine: what one made in a notebook, the other has from one file, to the last bit.

They are two accounts with a store and a Jupyter server each. Root's containers have their ids by mounts, the other
account's by a user namespace, so that the same image is laid out in two ways.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import BASE, other_account, our_processes
from tests.history.test_snapshot import DRIVER
from tests.jupyter.conftest import Server
from tests.jupyter.test_guest import INSTALL
from tests.jupyter.test_server import Session

pytestmark = [
    pytest.mark.alone,
    pytest.mark.usefixtures("image"),
    pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to be two users"),
]

#: What no installer leaves: modes, owners, links, attributes, times to the nanosecond, a hole, names that are no text.
ODD = r"""
import os
os.makedirs('/opt/odd/deep')
os.chdir('/opt/odd')
for number, mode in enumerate((0o4755, 0o2711, 0o1600, 0o000, 0o777)):
    open(f'mode{mode:o}', 'w').write('x' * number)
    os.chown(f'mode{mode:o}', number, 1000 + number)
    os.chmod(f'mode{mode:o}', mode)
open(b'name\n\xff\xfe', 'w').write('y')
os.symlink('nowhere', 'dangling'); os.link('mode777', 'deep/linked'); os.mkfifo('pipe')
with open('hole', 'wb') as file: file.truncate(3 << 20); file.seek(1 << 20); file.write(b'middle')
os.setxattr('hole', 'user.note', b'\x00\xffbytes'); os.setxattr('deep', 'user.overlay.opaque', b'y')
os.utime('hole', ns=(1, 1_234_567_890_123_456_789)); os.utime('dangling', ns=(1, 987_654_321), follow_symlinks=False)
os.chmod('deep', 0o1770)
os.remove('/usr/bin/apt-key')
os.chdir(os.path.expanduser('~'))
"""
#: A text, a table, an error, and a picture.
CELLS = {
    "text": "import sys, madeup\nprint('answer', madeup.answer)\nprint('to stderr', file=sys.stderr)\nsorted(sys.path)",
    "table": "import pandas\npandas.DataFrame({'a': [1.5, None], 'b': ['x', '<y>']}, index=['one', 'two'])",
    "error": "def divide(a):\n    return a / 0\n\ndivide(1)",
    "picture": "import struct, zlib\nfrom IPython.display import Image, display\n"
    "def chunk(kind, data):\n"
    "    body = kind + data\n"
    "    return struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))\n"
    "rows = b''.join(b'\\0' + bytes((x * y) % 256 for x in range(48)) for y in range(16))\n"
    "display(Image(b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', struct.pack('>2I5B', 16, 16, 8, 2, 0, 0, 0))"
    " + chunk(b'IDAT', zlib.compress(rows, 0)) + chunk(b'IEND', b'')))",
}

#: Write a kernelspec.
KERNEL = """
import pathlib, sys
from jupyter_core.paths import jupyter_data_dir
folder = pathlib.Path(jupyter_data_dir(), "kernels", sys.argv[1])
folder.mkdir(parents=True)
(folder / "kernel.json").write_text(sys.stdin.read())
"""


class Person:
    """Somebody with an account, a store and a server; all below one folder."""

    def __init__(self, folder: Path, account: str, python: str, store: Path) -> None:
        known = pwd.getpwnam(account)
        self.folder, self.python, self.store = folder, python, str(store)
        folder.mkdir(mode=0o700)
        os.chown(folder, known.pw_uid, known.pw_gid)
        self.process: dict[str, Any] = {
            "env": {
                "HOME": str(folder), "PATH": f"{Path(python).parent}:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8",
                "WORKBENCH_HOME": self.store, "JUPYTER_DATA_DIR": str(folder / "j"),
                "JUPYTER_RUNTIME_DIR": str(folder / "r"), "JUPYTER_CONFIG_DIR": str(folder / "c"),
                "IPYTHONDIR": str(folder / "i"),
            },
            "user": known.pw_uid, "group": known.pw_gid,
            "extra_groups": os.getgrouplist(account, known.pw_gid),
        }  # fmt: skip
        self.root = folder / "root"
        self.root.mkdir()
        os.chown(self.root, known.pw_uid, known.pw_gid)
        self.images = {name for row in self.rows("images") for name in row["names"]}

    def shell(self, *words: str, text: str = "", code: int = 0) -> str:
        """A program in the folder of the notebooks; what it printed."""
        done = subprocess.run(
            [self.python, *words], input=text, capture_output=True, text=True, cwd=self.root, timeout=120, check=False,
            **self.process,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout

    def cli(self, *words: str, **more: Any) -> str:
        return self.shell("-m", "workbench", *words, **more)

    def rows(self, *words: str) -> list[dict[str, Any]]:
        return list(json.loads(self.cli(*words, "--json")))

    @contextmanager
    def server(self) -> Iterator[Server]:
        server = Server(self.folder, python=self.python, **self.process)
        try:
            yield server
        finally:
            server.close()

    def tree(self, image: str) -> dict[str, Any]:
        """One hash of a whole environment as it is seen inside, and how many files and links that is."""
        run = ["run", "--rm", "--Workbench.offer_host_settings=False", "--no-folder", "--network", "none", image]
        return dict(json.loads(self.cli(*run, "/usr/bin/python3", "-ISuc", DRIVER, text='{"do": "hash"}\n')))

    def leave(self) -> None:
        """Nothing of theirs stays: no process, no container, no name, and at last no file."""
        for row in self.rows("ps", "--all"):
            self.cli("rm", "-f", row["id"])
        for row in self.rows("images"):
            for name in set(row["names"]) - self.images:
                self.cli("rmi", name)
        self.cli("gc")
        until = time.monotonic() + 10
        while left := our_processes(self.folder).keys() - {os.getpid()}:
            assert time.monotonic() < until, left
            time.sleep(0.05)
        remove = (
            "import sys; from workbench.linux import userns as u; u.call('workbench.linux.trees:remove', sys.argv[1])"
        )
        self.shell("-c", remove, str(self.folder / "w"))
        shutil.rmtree(self.folder)


@pytest.fixture
def people() -> Iterator[dict[str, Person]]:
    """Root with the store of the tests, the other account, and root with an empty store."""
    account, python = other_account()
    there = Path("/tmp", f"wbh{os.getpid()}")
    made = {
        "root": Person(BASE / "h1", "root", sys.executable, BASE / "w"),
        "user": Person(there, account, python, there / "w"),
        "other": Person(BASE / "h2", "root", sys.executable, BASE / "h2" / "w"),
    }
    yield made
    for person in made.values():
        person.leave()


def run_all(session: Session, path: Path) -> dict[str, Any]:
    """Run a notebook's cells from top to bottom, and return it with what they put out, as an editor has it then."""
    notebook = nbformat.read(path, 4)
    for number, cell in enumerate(notebook.cells, 1):
        cell.outputs, cell.execution_count = [], number
        request = session.execute(cell.source, cell=cell.id)
        for message in session.messages():
            if message["parent_header"].get("msg_id") != request or message["channel"] != "iopub":
                continue
            if message["content"].get("execution_state") == "idle":
                break
            if message["header"]["msg_type"] in ("stream", "display_data", "execute_result", "error"):
                cell.outputs.append(nbformat.v4.output_from_msg(nbformat.from_dict(message)))
    return dict(notebook)


def save(server: Server, notebook: dict[str, Any], path: str) -> None:
    body = {"type": "notebook", "format": "json", "content": notebook}
    status, answer = server.request(f"/api/contents/{path}", "PUT", body)
    assert status in (200, 201), answer


def outputs(path: Path | str) -> dict[str, list[Any]]:
    """By cell what it put out; streams as one text each, however they arrived."""
    found: dict[str, list[Any]] = {}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":  # papermill tells of an error above the notebook
            continue
        texts = {one.name: "" for one in cell.outputs if one.output_type == "stream"}
        for one in cell.outputs:
            if one.output_type == "stream":
                texts[one.name] += one.text
        found[cell.id] = [sorted(texts.items()), *(one for one in cell.outputs if one.output_type != "stream")]
    return found


def make(person: Person) -> str:
    """Work in a notebook, with a snapshot; its archive lies beside. The ID."""
    cells = [
        nbformat.v4.new_code_cell(source, id=name, metadata={"tags": ["raises-exception"]} if name == "error" else {})
        for name, source in CELLS.items()
    ]
    person.cli("tag", "base", "python")  # and with that a kernel in this account's own folder
    spec = {"name": "wb-base", "display_name": "Python", "language": "python"}
    with person.server() as server:
        save(server, dict(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})), "nb.ipynb")
        session = Session(server, "nb.ipynb", "wb-base")
        for source in (INSTALL, ODD):
            assert not session.run(source).error
        assert "[plots " in session.run("%container snapshot -m 'All that plots need' -t plots").stdout
        session.post("restart")
        session.reconnect()
        notebook = run_all(session, person.root / "nb.ipynb")
        save(server, notebook, "nb.ipynb")
        person.cli("export", "plots", "-o", "plots.oci.tar", "--with", "nb.ipynb")
        save(server, notebook, "nb.ipynb")  # which by now is known to be in that file
        session.close()
    return str(person.rows("log", "plots")[0]["id"])


@pytest.mark.parametrize(("giver", "taker"), [("root", "user"), ("user", "other")])
def test_what_one_made_the_other_has(people: dict[str, Person], giver: str, taker: str) -> None:
    one, other = people[giver], people[taker]
    if giver != "root":
        hand(people["root"], one, "python", "base.oci.tar")
        one.cli("import", "base.oci.tar")
    image = make(one)
    seen = one.tree("plots")
    ran = outputs(one.root / "nb.ipynb")
    assert [len(each) for each in ran.values()] == [2, 2, 2, 2] and seen["files"] > 10_000 and seen["links"] >= 1
    assert ran["error"][1].ename == "ZeroDivisionError" and "image/png" in ran["picture"][1].data
    # without the image, the notebook alone: one word, and nothing else is started
    hand_file(one, other, "nb.ipynb")
    left = (one.folder / "j" / "kernels" / "wb-plots" / "kernel.json").read_text()  # as of an image that is gone
    other.shell("-c", KERNEL, "wb-plots", text=left.replace(one.store, other.store))
    with other.server() as server:
        body = {"path": "nb.ipynb", "name": "nb.ipynb", "type": "notebook", "kernel": {"name": "wb-plots"}}
        status, answer = server.request("/api/sessions", "POST", body)
        assert status >= 400
        assert f"image {image[7:19]} (plots) is not here, last seen in plots.oci.tar" in answer["message"]
        assert server.request("/api/kernels")[1] == []
    (other.root / "nb.ipynb").unlink()
    # with it, from that one file
    hand_file(one, other, "plots.oci.tar")
    assert other.cli("import", "plots.oci.tar").splitlines() == [f"plots:latest {image}", "nb.ipynb"]
    assert other.tree("plots") == seen
    with other.server() as server:
        name = json.loads((other.root / "nb.ipynb").read_text())["metadata"]["kernelspec"]["name"]
        assert name == "wb-plots"
        session = Session(server, "nb.ipynb", name)
        save(server, run_all(session, other.root / "nb.ipynb"), "nb.ipynb")
        session.close()
    assert outputs(other.root / "nb.ipynb") == ran
    saved = json.loads((other.root / "nb.ipynb").read_text())
    assert saved["metadata"]["workbench"]["image"] == image
    assert [cell["metadata"]["workbench"] for cell in saved["cells"]] == [{"image": image}] * len(CELLS)
    # and by clients that know nothing but the kernel that the notebook names
    other.shell("-m", "jupyter", "execute", "nb.ipynb", "--output", "executed")
    # papermill runs them all, and then ends as the error in one of them says
    other.shell("-m", "papermill", "--no-progress-bar", "nb.ipynb", "milled.ipynb", code=1)
    assert outputs(other.root / "executed.ipynb") == ran
    assert outputs(other.root / "milled.ipynb") == ran
    assert other.cli("check") == "Everything is as its digests say.\n"


def hand(one: Person, other: Person, image: str, file: str) -> None:
    """An image from one to another."""
    one.cli("export", image, "-o", file)
    hand_file(one, other, file)


def hand_file(one: Person, other: Person, file: str) -> None:
    shutil.copy(one.root / file, other.root)
    os.chown(other.root / file, other.process["user"], other.process["group"])
