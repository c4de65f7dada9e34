#!/usr/bin/env bash
# The notebooks in a fresh Python 3.12, as Colab runs them: `make colab`. Downloads about 3 GB the first time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python3.12 || ls "$HOME"/.pyenv/versions/3.12*/bin/python 2>/dev/null | tail -n 1 || true)
[ -n "$python" ] || { echo "Python 3.12 is missing: sudo apt-get install python3.12 python3.12-venv"; exit 1; }
ready=_build/colab/.ready-$(cat requirements.txt requirements-book.txt | cksum | cut -d ' ' -f 1)
if [ ! -f "$ready" ]; then
  [ -x _build/colab/bin/pip ] || "$python" -m venv _build/colab
  rm -f _build/colab/.ready*
  _build/colab/bin/pip install -q -r requirements.txt
  touch "$ready"
fi
exec _build/colab/bin/python -m pytest -q -p no:cacheprovider tests/notebooks
