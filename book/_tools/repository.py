"""Set the repository's address everywhere: `python book/_tools/repository.py https://github.com/NAME/REPOSITORY`."""

import re
import sys
from pathlib import Path

KINDS = ("*.md", "*.ipynb", "*.yml", "*.toml", "*.cff")


def current() -> str:
    """The address that _config.yml gives."""
    return re.search(r"^  url: (\S+)$", Path("_config.yml").read_text("utf-8"), re.M).group(1)


def main(url: str) -> None:
    """Replace the present address by `url` in every text file of the book."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        sys.exit(f"URL must look like https://github.com/NAME/REPOSITORY, got {url!r}")
    old = current()
    for path in (p for kind in KINDS for p in Path().rglob(kind)):
        if not {".venv", "_build", ".git", "tests"} & set(path.parts) and old in (text := path.read_text("utf-8")):
            path.write_text(text.replace(old, url), "utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
