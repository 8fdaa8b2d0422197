"""Requirements from files beside a recipe, and folders in repo2docker's form."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from workbench.build import recipe, repo2docker
from workbench.build.wheels import host_uv
from workbench.model import InvalidInput, NotFound, WorkbenchError

BASE = 'name = "x"\n[base]\nsuite = "bookworm"\n'


def load(folder: Path, text: str) -> recipe.Recipe:
    (folder / "recipe.toml").write_text(BASE + text)
    return recipe.load(folder)


def test_requirements(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "# a comment\nsix>=1 # another\n\nattrs==25.1.0 \\\n  --hash=sha256:00\nnumpy ; python_version > '3'\n"
    )
    found = load(tmp_path, '[python]\npackages = ["six"]\nrequirements = "requirements.txt"\n')
    assert found.python.packages == ("six", "six>=1", "attrs==25.1.0", "numpy ; python_version > '3'")


def test_a_pylock(tmp_path):
    (tmp_path / "pylock.toml").write_text(
        'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "six"\nversion = "1.17.0"\n'
        '[[packages]]\nname = "colorama"\nversion = "0.4.6"\nmarker = "sys_platform == \'win32\'"\n'
    )
    found = load(tmp_path, '[python]\npylock = "pylock.toml"\n')
    assert found.python.packages == ("six==1.17.0", "colorama==0.4.6 ; sys_platform == 'win32'")


def test_a_project_with_its_lock(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(
        '[project]\nname = "app"\nversion = "1"\nrequires-python = ">=3.11"\n'
        'dependencies = ["six==1.16.0", "ipykernel"]\n'
    )
    subprocess.run([host_uv(), "lock", "--project", str(tmp_path / "app")], check=True, capture_output=True)
    found = load(tmp_path, '[python]\nproject = "app"\n')
    assert "six==1.16.0" in found.python.packages
    assert found.has_ipykernel  # among those that only the lock names
    assert not [text for text in found.python.packages if "app" in text.split("==")[0] and "appnope" not in text]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("requirements", "-r other.txt\n", "line 1: -r is not understood"),
        ("requirements", "six\n--index-url https://x\n", "line 2: --index-url is not understood"),
        ("requirements", "six\n./here\n", "'./here' is no Python requirement"),
        ("pylock", '[[packages]]\nname = "x"\nvcs = {}\n', "x has no version of an index"),
        ("pylock", "= 1", "Invalid statement"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, file, content, said):
    (tmp_path / "file").write_text(content)
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, f'[python]\n{file} = "file"\n')
    assert said in str(caught.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "requirements.txt").write_bytes("six\n".encode("utf-16"))
    with pytest.raises(InvalidInput, match="not UTF-8 at byte 0"):
        load(tmp_path, '[python]\nrequirements = "requirements.txt"\n')


def test_a_kernel_whose_packages_stand_in_a_file(tmp_path):
    (tmp_path / "requirements.txt").write_text("ipykernel\n")
    found = load(tmp_path, '[python]\nrequirements = "requirements.txt"\n[kernel]\ndisplay_name = "X"\n')
    assert found.kernel_spec().display_name == "X"


def test_no_file_from_elsewhere(tmp_path):
    (tmp_path / "secret").write_text("six\n")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link").symlink_to("../secret")
    for name in ("../secret", "link"):
        with pytest.raises(InvalidInput, match="leads out of the recipe's folder"):
            load(inner, f'[python]\nrequirements = "{name}"\n')
    with pytest.raises(NotFound, match="there is no"):
        load(inner, '[python]\nrequirements = "nothing"\n')


def test_repo2dockers_form(tmp_path):
    folder = tmp_path / "My Repo"
    folder.mkdir()
    (folder / "apt.txt").write_text("# tools\nhello\nsl tree\n")
    (folder / "requirements.txt").write_text("six\n")
    (folder / "runtime.txt").write_text("python-3.13\n")
    (folder / "postBuild").write_text("#!/bin/sh\ntouch /opt/done\n")
    (folder / "start").write_text('#!/bin/sh\nexport A=1\nexec "$@"\n')
    found = recipe.load(folder)
    assert (found.name, found.base.suite) == ("my-repo", "trixie")
    assert found.apt.packages == ("hello", "sl", "tree")
    assert found.python.packages == ("six", "ipykernel")
    assert found.files == {f"{repo2docker.HOME}/postBuild": "postBuild", f"{repo2docker.HOME}/start": "start"}
    assert [step.network for step in found.run] == [True]
    assert found.kernel_spec().argv[:2] == ("/bin/sh", f"{repo2docker.HOME}/start")


def test_repo2dockers_form_in_binder_with_r(tmp_path):
    (tmp_path / "binder").mkdir()
    (tmp_path / "binder" / "runtime.txt").write_text("r-4.2-2023-01-01")
    (tmp_path / "binder" / "install.R").write_text("stopifnot(TRUE)\n")
    found = recipe.load(tmp_path)
    assert "r-cran-irkernel" in found.apt.packages
    assert found.files == {f"{repo2docker.HOME}/install.R": "binder/install.R"}
    assert found.kernel_spec().transport == "tcp"


@pytest.mark.parametrize("name", ["environment.yml", "Dockerfile", "Project.toml", "default.nix", "Pipfile"])
def test_what_cannot_be_built_is_refused_with_a_word(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(WorkbenchError) as caught:
        recipe.load(tmp_path)
    assert str(caught.value).startswith(f"read a folder of repo2docker's form: {tmp_path / name}: ")


def test_a_python_that_cannot_be_had(tmp_path):
    (tmp_path / "runtime.txt").write_text("python-3.7\n")
    with pytest.raises(InvalidInput, match=r"python-3.7 cannot be had; here are 3.11, 3.13"):
        recipe.load(tmp_path)
    (tmp_path / "runtime.txt").unlink()
    with pytest.raises(InvalidInput, match=r'Python 3.13 cannot be had: .*; take base.suite = "trixie"'):
        load(tmp_path, '[python]\nversion = "3.13"\n')
