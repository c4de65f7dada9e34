"""Execute notebooks and store their outputs: `python book/_tools/outputs.py [NOTEBOOK ...]`, all by default."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> float:
    """Run a notebook top to bottom in a fresh kernel, in its own folder, and write it back; returns the seconds."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": path.parent}})
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", "utf-8")
    return time.perf_counter() - start


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(Path("book").rglob("*.ipynb"))):
        print(f"{path}: {execute(path):.1f} s", flush=True)
