"""An environment like Colab's: the project's packages, a stand-in `google.colab`, and no checkout on the path."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from standin import ADDRESS, ROOT, run


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """The working tree as a git repository whose address has been set with the project's own command."""
    folder = tmp_path_factory.mktemp("published")
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    run(sys.executable, "book/_tools/repository.py", ADDRESS, cwd=folder)
    run("git", "init", "-q", "-b", "main", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "all", cwd=folder)
    return folder


@pytest.fixture(scope="session")
def colab(published, tmp_path_factory) -> dict:
    """Python and environment variables of the stand-in."""
    folder = tmp_path_factory.mktemp("colab")
    run(sys.executable, "-m", "venv", folder)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text("")
    (site / "stand_in.pth").write_text(f"{sysconfig.get_paths()['purelib']}\nimport google.colab\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{published}.insteadOf"}
    environment |= {"GIT_CONFIG_VALUE_0": ADDRESS, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    beside = ROOT.parent / "shared" / "data" / "omniglot"
    if "METALEARN_DATA" not in environment and beside.is_dir():
        environment["METALEARN_DATA"] = str(beside)
    return {"python": folder / "bin" / "python", "env": environment, "site": site}
