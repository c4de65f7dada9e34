"""Every notebook is executed as on Colab, by its own setup cell, and every text output is compared."""

import os
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest
from standin import ROOT, run

NOTEBOOKS = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BUDGET = 60
VERSIONS = "import torch, numpy; print(torch.__version__, numpy.__version__)"
WHERE = "import metalearn_utils; print(metalearn_utils.__file__)"


def alone(notebook: Path, published: Path, folder: Path) -> Path:
    """The published notebook in a folder of its own."""
    return Path(shutil.copy(published / notebook.relative_to(ROOT), folder))


def needs_data(notebook: Path) -> bool:
    return "Omniglot(" in notebook.read_text("utf-8")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_reproduced_strictly_as_on_colab(notebook, published, colab, tmp_path):
    if needs_data(notebook) and "METALEARN_DATA" not in colab["env"]:
        pytest.skip("METALEARN_DATA is not set: no real handwriting here")
    before = run(colab["python"], "-c", VERSIONS, env=colab["env"])
    start = time.perf_counter()
    config = Path(__file__).with_name("sanitize.cfg")
    command = ["-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=600", "-q", "-p", "no:cacheprovider"]
    command += [f"--nbval-sanitize-with={config}", alone(notebook, published, tmp_path)]
    report = run(colab["python"], *command, env=colab["env"], cwd=tmp_path)
    seconds = time.perf_counter() - start
    print(f"{notebook.stem}: {seconds:.0f} s of {BUDGET}")
    assert re.search(r"\d+ passed", report)
    assert seconds < 3 * BUDGET or "METALEARN_UNTIMED" in os.environ  # `make matrix` compares outputs only
    assert run(colab["python"], "-c", VERSIONS, env=colab["env"]) == before
    installed = run(colab["python"], "-c", WHERE, env=colab["env"], cwd=tmp_path)
    assert str(colab["site"]) in installed, "the library must come from the setup cell"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_full_mode_runs_with_all_counts_cut_to_two(notebook, published, colab, tmp_path):
    if needs_data(notebook) and "METALEARN_DATA" not in colab["env"]:
        pytest.skip("METALEARN_DATA is not set: no real handwriting here")
    environment = colab["env"] | {"METALEARN_MODE": "full", "METALEARN_CUT": "2"}
    script = "import sys, nbformat; from nbclient import NotebookClient as C; C(nbformat.read(sys.argv[1], 4), timeout=600).execute()"
    run(colab["python"], "-c", script, alone(notebook, published, tmp_path), env=environment, cwd=tmp_path)


def test_pages_run_with_ipywidgets_7(published, colab, tmp_path):
    """Colab ships ipywidgets 7.7, which has no Stack: the slider then asks the live kernel."""
    old = tmp_path / "old"
    packages = ["ipywidgets==7.7.5", "ipython_genutils==0.2.0"]
    run(colab["python"], "-m", "pip", "install", "-q", "--no-deps", "--target", old, *packages, env=colab["env"])
    notebook = next(p for p in NOTEBOOKS if "scrub(" in p.read_text("utf-8"))
    environment = colab["env"] | {"PYTHONPATH": str(old), "METALEARN_MODE": "full", "METALEARN_CUT": "2"}
    version = run(colab["python"], "-c", "import ipywidgets; print(ipywidgets.__version__)", env=environment)
    assert version.startswith("7.7")
    script = "import sys, nbformat; from nbclient import NotebookClient as C; C(nbformat.read(sys.argv[1], 4), timeout=600).execute()"
    run(colab["python"], "-c", script, alone(notebook, published, tmp_path), env=environment, cwd=tmp_path)


def test_a_changed_output_is_noticed(colab, tmp_path):
    """The comparison itself can fail: a notebook whose stored figure was altered does not pass."""
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("print(1.25)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1.26\n")]
    notebook.cells = [cell]
    nbformat.write(notebook, tmp_path / "altered.ipynb")
    with pytest.raises(AssertionError, match="1 failed"):
        run(colab["python"], "-m", "pytest", "--nbval", "--nbval-current-env", "-q", tmp_path / "altered.ipynb", env=colab["env"])
