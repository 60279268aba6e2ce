"""pip's settings on this machine, for a build that sees nothing of it.

``python docker/pip_settings.py FILE`` writes them to FILE as a ``pip.conf`` and prints the paths of this machine that
they name, one a line: what the build has to see beside that file.
"""

import ast
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ENVIRONMENT = ":env:"
NOT_FOR_A_FILE = "config-file"  # where a pip.conf lies is no setting of it


def read_settings(listing: str) -> dict[str, dict[str, str]]:
    """Values by section and name from what ``pip config list`` prints; the environment's win, as they do in pip."""
    sections: dict[str, dict[str, str]] = {"global": {}}
    environment: dict[str, str] = {}
    for line in listing.splitlines():
        key, literal = line.split("=", 1)
        section, name = key.rsplit(".", 1)
        values = environment if section == ENVIRONMENT else sections.setdefault(section, {})
        if name != NOT_FOR_A_FILE:
            values[name] = str(ast.literal_eval(literal))
    for values in sections.values():
        for name in environment.keys() & values.keys():
            del values[name]
    sections["global"] |= environment
    return sections


def named_paths(sections: dict[str, dict[str, str]]) -> list[Path]:
    """The files and folders that exist and that a value names, as a path or a ``file:`` address; each once, sorted.

    An index on the disk is named by the folder that it lies in: its pages link to files beside them.
    """
    paths = set()
    for values in sections.values():
        for name, value in values.items():
            for word in value.split():
                path = Path(unquote(urlsplit(word).path)) if word.startswith("file:") else Path(word)
                if path.is_absolute() and path.exists():
                    paths.add(path.parent if name.endswith("index-url") else path)
    return sorted(paths)


def write_settings(sections: dict[str, dict[str, str]], file: Path) -> None:
    """Write a ``pip.conf``; a value of several lines keeps them."""
    parser = RawConfigParser()
    parser.read_dict({section: values for section, values in sections.items() if values})
    file.touch(mode=0o600)  # an address of an index may hold a password
    with file.open("w") as stream:
        parser.write(stream)


if __name__ == "__main__":
    printed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    settings = read_settings(printed)
    write_settings(settings, Path(sys.argv[1]))
    print(*named_paths(settings), sep="\n")
