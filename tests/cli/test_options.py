"""The option parser: what is meant, what is refused, and how that is said."""

from __future__ import annotations

import pytest

from workbench.cli import options


def test_run_leaves_the_commands_own_options_alone():
    parsed = options.parse(
        ["run", "--network", "none", "--mount", "/a", "--mount", "/b:/c:ro", "python", "python", "--version", "--rm"]
    )
    assert parsed.values.image == "python"
    assert parsed.values.command == ["python", "--version", "--rm"]
    assert (parsed.values.network, parsed.values.mount, parsed.values.rm) == ("none", ["/a", "/b:/c:ro"], False)
    assert parsed.plain


def test_run_without_a_command():
    assert options.parse(["run", "python"]).values.command == []


def test_settings_as_with_every_jupyter_application():
    parsed = options.parse(["run", "--Workbench.memory=2G", "python", "echo", "--Workbench.memory=1G"])
    assert parsed.settings == ("--Workbench.memory=2G",)
    assert parsed.values.command == ["echo", "--Workbench.memory=1G"]
    assert not parsed.plain


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["biuld"], "did you mean `jupyter workbench build`"),
        (["zzz"], "see `jupyter workbench --help`"),
        (["run"], "required: IMAGE"),
        (["run", "--memroy", "3", "x"], "did you mean --memory"),
        (["run", "--network", "fast", "x"], "'fast'"),
        (["run", "--cpus", "many", "x"], "--cpus"),
        (["ps", "--jsn"], "did you mean --json"),
        (["rm"], "required: CONTAINER"),
        (["build"], "required: FOLDER"),
        (["--debug"], "name a command"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(line, expected, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse(line)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("jupyter workbench") and said.count("\n") == 1 and expected in said


@pytest.mark.parametrize("name", ["", *options.COMMANDS])
def test_help_fits_a_terminal_and_names_everything(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        options.parse([*filter(None, [name]), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(len(line) <= 88 for line in text.splitlines()), text
    assert "--debug" in text


def test_help_of_a_command_by_word(capsys):
    with pytest.raises(SystemExit):
        options.parse(["help", "run"])
    assert "IMAGE" in capsys.readouterr().out
