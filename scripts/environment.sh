# Sourced by the other scripts: install clipdeploy with the extras in $1 (such as "[test]") into .venv
# and put it first on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "clipdeploy needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
# The stamp has a line for each extra that was installed, so that later runs skip the installation. Any extra
# includes what clipdeploy needs without one.
stamp=.venv/installed
sum=$(cat setup.cfg constraints.txt | cksum)
extras=${1:-}
IFS=, read -ra wanted <<<"${extras//[\[\]]/}"
missing=
for extra in "${wanted[@]:-}"; do
  grep -qE -- "^${extra:-.*} $sum$" "$stamp" 2>/dev/null || missing=yes
done
if [ -n "$missing" ]; then
  say "installing clipdeploy$extras into .venv (PyTorch, ONNX Runtime, TensorRT-RTX: some minutes)"
  # Python compiles the modules that are imported: compiling all of PyTorch takes pip half of its time.
  install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt)
  # On Linux without an NVIDIA driver PyTorch's CPU build is enough, where pip can find one.
  "${install[@]}" torch==2.13.0
  "${install[@]}" -e ".$extras"
  for extra in "${wanted[@]:-}"; do echo "${extra:-none} $sum" >>"$stamp"; done
fi
PATH="$PWD/.venv/bin:$PATH"
