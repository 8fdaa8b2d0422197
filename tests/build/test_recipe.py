"""recipe.toml: everything wrong is one line that names file and key."""

from __future__ import annotations

import sys

import pytest

from tests.conftest import TOP
from workbench.build import recipe
from workbench.model import InvalidInput, Kernel, Limits, NotFound

OK = 'name = "x"\n[base]\nsuite = "bookworm"\n'


def test_the_smallest_recipe_has_no_kernel_and_no_limits():
    found = recipe.parse(OK)
    assert (found.name, found.base.suite, found.kernel_spec()) == ("x", "bookworm", None)
    assert found.limit_values() == Limits()


def test_a_full_recipe():
    found = recipe.parse(
        """
        name = "team/tools"
        description = "all keys"
        [base]
        suite = "trixie"
        [apt]
        packages = ["graphviz", "g++", "libc6:amd64", "curl=7.88.1-10+deb12u8"]
        [python]
        packages = ["ipykernel", "pandas[excel]>=2,<4; python_version > '3'", "x @ https://example.org/x.whl"]
        [env]
        TZ = "UTC"
        [kernel]
        display_name = "Tools"
        [limits]
        memory = "1.5G"
        processes = 100
        cpus = 2
        """
    )
    assert found.limit_values() == Limits(memory=3 << 29, processes=100, cpus=2.0)
    assert found.env == {"TZ": "UTC"}
    assert found.kernel_spec() == Kernel(recipe.IPYKERNEL_ARGV, "python", "Tools", "message")


def test_a_kernel_of_its_own_is_interrupted_by_signal():
    found = recipe.parse(OK + '[kernel]\nargv = ["/usr/bin/R", "{connection_file}"]\nlanguage = "R"')
    assert found.kernel_spec() == Kernel(("/usr/bin/R", "{connection_file}"), "R", "R (x)", "signal")


@pytest.mark.parametrize("text", ["ipykernel", "IPyKernel>=6", "ipykernel[test] ; python_version>'3'"])
def test_ipykernel_is_found_however_it_is_written(text):
    assert recipe.parse(OK + f'[python]\npackages = ["{text}"]').has_ipykernel


WRONG = [
    ("", "name: missing"),
    ('name = "x"', 'base: missing; add [base] with suite = "bookworm"'),
    ('nmae = "x"', "nmae: unknown key; did you mean name?"),
    (OK + "[pyhton]\npackages = []", "pyhton: unknown key; did you mean python?"),
    (OK + "[python]\npackges = []", "python.packges: unknown key; did you mean python.packages?"),
    ("packages = []\n" + OK, "packages: unknown key; did you mean apt.packages?"),
    ('memory = "2G"\n' + OK, "memory: unknown key; did you mean limits.memory?"),
    (OK + "[zzz]", "zzz: unknown key; known here are name, base,"),
    ("name = 3\n[base]\nsuite = 'bookworm'", "name: expected text, got a whole number"),
    ("name = 'x'\nbase = 'bookworm'", "base: expected table, got text"),
    (OK + '[python]\npackages = "a"', "python.packages: expected a list, got text"),
    (OK + '[python]\npackages = ["a", 1]', "python.packages[1]: expected text, got a whole number"),
    (OK + "[limits]\nmemory = true", "limits.memory: expected text or a whole number, got true or false"),
    (OK + '[limits]\nmemory = "lots"', "limits.memory: 'lots' is no number of bytes"),
    (OK + '[limits]\nmemory = "1K"', "limits.memory: '1K' is less than 16M"),
    (OK + '[limits]\nprocesses = "3"', "limits.processes: expected a whole number, got text"),
    (OK + "[limits]\nprocesses = 0", "limits.processes: 0 is less than 1"),
    (OK + "[limits]\ncpus = -1", "limits.cpus: -1.0 is no number of processors"),
    (OK + "[env]\nA = 1", "env.A: 1 is no text"),
    (OK + "[env]\n'A B' = ''", "env.A B: is no name of an environment variable"),
    (OK.replace('"x"', '"X y"'), "name: 'X y' is no image name"),
    (OK.replace("bookworm", "bokworm"), "base.suite: 'bokworm' is no Debian suite known here; did you mean"),
    (OK + '[apt]\npackages = ["-o x"]', "apt.packages[0]: '-o x' is no Debian package name"),
    (OK + '[apt]\npackages = ["a b"]', "apt.packages[0]: 'a b' is no Debian package name"),
    (OK + '[python]\npackages = ["--index-url=x"]', "python.packages[0]: '--index-url=x' is no Python req"),
    (OK + '[python]\npackages = ["./here"]', "python.packages[0]: './here' is no Python requirement"),
    (OK + '[python]\npackages = ["a @ file:///x"]', "python.packages[0]: 'a @ file:///x' points at a local"),
    (OK + "[kernel]", "kernel.argv: missing, and the recipe installs no ipykernel"),
    (OK + '[kernel]\nargv = ["/bin/k"]', "kernel.argv: no element holds {connection_file}"),
    (OK + '[kernel]\nargv = ["python", "{connection_file}"]', "kernel.argv[0]: 'python' is no absolute path"),
    (OK + '[kernel]\ninterrupt_mode = "x"', "kernel.interrupt_mode: invalid value 'x'; write \"signal\""),
    ("name = = 1", "Invalid value (at line 1, column 8)"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_what_is_wrong_is_said_in_one_line(text, said):
    with pytest.raises(InvalidInput) as caught:
        recipe.parse(text, "here/recipe.toml")
    assert f"here/recipe.toml: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_there_is_no_recipe(tmp_path):
    with pytest.raises(NotFound, match="no such folder"):
        recipe.load(tmp_path / "nowhere")
    with pytest.raises(NotFound, match=r"recipe\.toml: there is no such file"):
        recipe.load(tmp_path)
    (tmp_path / "recipe.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="not UTF-8 at byte 0"):
        recipe.load(tmp_path)
    (tmp_path / "recipe.toml").write_text(OK)
    assert recipe.load(tmp_path) == recipe.load(tmp_path / "recipe.toml") == recipe.parse(OK)


def test_shipped_recipes_are_found_by_name_and_all_are_valid():
    assert "python" in recipe.shipped()
    for name, folder in recipe.shipped().items():
        assert recipe.load(recipe.find(name)) == recipe.load(folder)
    with pytest.raises(NotFound, match="did you mean python"):
        recipe.find("pyton")


def test_the_schema_for_editors_is_that_of_the_code():
    """``docs/recipe.schema.json``; write it anew with the line below when this fails."""
    path = TOP / "docs" / "recipe.schema.json"
    assert path.read_text() == recipe.schema(), f"{sys.executable} -m workbench.build.recipe > {path}"


NOT_LISTED = {"base", "apt", "python", "kernel", "limits", "run"}  # tables, told by their keys


def test_every_key_is_described():
    text = (TOP / "docs" / "recipes.md").read_text()
    for key in set(recipe.known_keys()) - NOT_LISTED:
        assert f"`{key}`" in text or f"`.{key.split('.')[-1]}`" in text or f"`{key.split('.')[-1]}`" in text, key
