"""The entry point answers what it can without torch, and says what typer says."""

import shutil
import subprocess
import sys

import pytest

import hf_reasoncache_cli
from hf_reasoncache import __version__
from tests.support.command_help import ALL, FOLDER, texts


def test_the_help_files_are_what_typer_prints():
    expected = texts()
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(expected)
    for name, text in expected.items():
        assert (FOLDER / f"{name}.txt").read_text("utf-8") == text, (
            "python -m tests.support.command_help writes the files anew"
        )
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version"], f"hf-reasoncache {__version__}"),
        (["-h"], "Usage: hf-reasoncache [OPTIONS] COMMAND"),
        ([], "Usage: hf-reasoncache [OPTIONS] COMMAND"),
        (["chat", "--help"], "Usage: hf-reasoncache chat [OPTIONS]"),
        (["completion", "bash"], "_hf_reasoncache() {"),
    ],
)
def test_help_and_version_import_nothing_heavy(arguments, expected):
    code = (
        "import sys, hf_reasoncache_cli; "
        f"sys.argv = ['hf-reasoncache', *{arguments!r}]; hf_reasoncache_cli.main(); "
        "assert not {'torch', 'transformers', 'hf_reasoncache', 'typer'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(expected)


@pytest.mark.parametrize(
    "arguments", [["nothing", "-h"], ["show", "x", "-h"], ["../show", "-h"], ["show"]]
)
def test_all_else_is_left_to_the_commands(arguments):
    assert hf_reasoncache_cli.answer(arguments) is None
    assert hf_reasoncache_cli.help_of("nothing") is None
    assert hf_reasoncache_cli.help_of(ALL) is not None


def complete(*words: str) -> list[str]:
    """What bash offers for the last of some words."""
    code = """
        source /dev/stdin
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _hf_reasoncache
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    shell = shutil.which("bash")
    assert shell is not None
    ran = subprocess.run(
        [shell, "-c", code, "bash", "hf-reasoncache", *words],
        input=hf_reasoncache_cli.completion_of("bash"),
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.split()


def test_bash_completes_commands_and_the_options_of_each():
    assert complete("c") == ["calibrate", "chat", "compare", "completion"]
    assert set(complete("")) == set(texts()) - {ALL}
    assert complete("calibrate", "--no-p") == ["--no-protect-prompt"]
    assert complete("plan", "x", "--b") == ["--budget", "--branches", "--batch", "--bandwidth"]
    assert complete("plan", "") == [], "files are completed instead"


@pytest.mark.parametrize("shell", hf_reasoncache_cli.completion.SHELLS)
def test_the_scripts_of_all_shells_have_all_commands(shell, run):
    text = hf_reasoncache_cli.completion_of(shell)
    assert run("completion", shell) == (0, text, "")
    for command in set(texts()) - {ALL}:
        assert command in text
    executable = shutil.which(shell)
    if executable is not None:
        subprocess.run([executable, "-n"], input=text, text=True, check=True)
