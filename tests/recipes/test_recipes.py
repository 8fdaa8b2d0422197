"""Each shipped recipe builds from its lock and is what it promises, by a script that runs inside of it."""

from __future__ import annotations

import json
import os

import pytest

from tests.conftest import TOP
from workbench.build import recipe

NAMES = sorted(recipe.shipped())
#: What takes long and differs from others in its Python packages only.
ONCE = {"python-tensorflow-linux": pytest.mark.second, "python-sklearn": pytest.mark.first}


def test_all_that_are_in_the_folder_are_shipped():
    assert sorted(path.parent.name for path in (TOP / "recipes").glob("*/recipe.toml")) == NAMES
    assert {"python", "python-tensorflow-linux", "python-sklearn", "r", "bash", "debian-trixie"} <= set(NAMES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=ONCE.get(name, ())) for name in NAMES])
def test_it_builds_from_its_lock_and_keeps_its_promises(cli, name):
    done = cli("build", str(TOP / "recipes" / name), "--refresh", "--json", timeout=280)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["locked"]
    assert found["identical"] or found["renewed"], found["differences"]
    verify = TOP / "recipes" / name / "verify"
    done = cli("run", "--rm", "--network", "none", found["id"], str(verify), cwd=verify.parent, timeout=200)
    assert done.code == 0, done.out + done.err
    assert done.out.count("\n") == 1


def images(cli) -> dict[str, dict]:
    return {name: row for row in json.loads(cli("images", "--json").out) for name in row["names"]}


def test_the_shell_is_small(cli):
    cli("build", str(TOP / "recipes" / "bash"), "--refresh")
    assert images(cli)["bash:latest"]["size"] < 150e6


@pytest.mark.first
def test_what_stands_on_another_recipe_shares_its_layers(cli, image):
    row = json.loads(cli("build", str(TOP / "recipes" / "python-sklearn"), "--refresh", "--json", timeout=280).out)
    below = images(cli)["python:latest"]["id"]
    assert layers(cli, row["id"])[: len(layers(cli, below))] == layers(cli, below)


def layers(cli, image_id: str) -> list[str]:
    """Straight from the image's config."""
    path = f"{os.environ['WORKBENCH_HOME']}/blobs/sha256/{image_id.removeprefix('sha256:')}"
    with open(path) as file:
        return json.load(file)["rootfs"]["diff_ids"]
