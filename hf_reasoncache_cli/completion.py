"""Scripts that let a shell complete commands and options, made of the help texts.

They hold all words themselves: pressing the tab key starts no Python.
"""

from __future__ import annotations

import re
from enum import Enum


class Shell(str, Enum):
    """Those for which there is a script."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


SHELLS = [shell.value for shell in Shell]

_OPTION = re.compile(r"--[a-z][a-z-]*")

_BASH = """\
_hf_reasoncache() {{
    local words="" word="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "$word" in -*) case "${{COMP_WORDS[1]}}" in
{cases}
        esac ;; esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _hf_reasoncache hf-reasoncache
"""

_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, helps: dict[str, str]) -> str:
    """Return what a shell is to read.

    Parameters
    ----------
    shell : str
        One of `SHELLS`.
    helps : dict of str to str
        Help of each command by its name.
    """
    options = {name: _options(text) for name, text in sorted(helps.items())}
    if shell == "fish":
        return _fish(options)
    cases = (f'            {name}) words="{" ".join(each)}" ;;' for name, each in options.items())
    text = _BASH.format(commands=" ".join(options), cases="\n".join(cases))
    return text if shell == "bash" else _ZSH + text


def _fish(options: dict[str, list[str]]) -> str:
    begin = "complete -c hf-reasoncache -n"
    lines = [f'{begin} __fish_use_subcommand -f -a "{" ".join(options)}"']
    for name, each in options.items():
        lines += [
            f'{begin} "__fish_seen_subcommand_from {name}" -l {option.removeprefix("--")}'
            for option in each
        ]
    return "\n".join(lines) + "\n"


def _options(text: str) -> list[str]:
    """Options that a help text lists, in its order."""
    heads = (line.strip().split("  ")[0] for line in text.splitlines() if line.startswith("  -"))
    return list(dict.fromkeys(found for head in heads for found in _OPTION.findall(head)))
