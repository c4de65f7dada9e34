"""Set the repository's address everywhere: `python book/_tools/repository.py https://github.com/NAME/REPOSITORY`."""

import re
import sys
from pathlib import Path

KINDS = (".md", ".ipynb", ".yml", ".toml", ".cff")
TOP = [Path(), Path("book"), Path("metalearn_utils"), Path(".github")]


def current() -> str:
    """The address that _config.yml gives."""
    return re.search(r"^  url: (\S+)$", Path("_config.yml").read_text("utf-8"), re.M).group(1)


def texts() -> list[Path]:
    """The text files of the project: those at the top, and all below its own folders."""
    found = [p for top in TOP for p in (top.rglob("*") if top.name else top.iterdir())]
    return sorted(p for p in found if p.suffix in KINDS and p.is_file() and ".ipynb_checkpoints" not in p.parts)


def main(url: str) -> None:
    """Replace the present address by `url` in every text file of the project."""
    url = url.strip().removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        sys.exit(f"URL must look like https://github.com/NAME/REPOSITORY, got {url!r}: make repository URL=...")
    old = re.compile(re.escape(current()) + r"(?![\w-])")
    for path in texts():
        text = path.read_text("utf-8")
        if (changed := old.sub(url, text)) != text:
            path.write_text(changed, "utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
