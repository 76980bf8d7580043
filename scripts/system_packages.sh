#!/usr/bin/env bash
# Install the system packages of some tests, on Debian and as root: a browser for the HTML report, a
# compiler and ONNX Runtime's C headers for the C++ sample. Without them these tests are skipped.
# Source this file: it may export ONNXRUNTIME_INCLUDE_DIR.
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "system_packages.sh: not root on Debian, nothing installed" >&2
  return 0 2>/dev/null || exit 0
fi
packages=(chromium fonts-dejavu-core g++ cmake)
install() { apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
apt-get update -qq || true
install "${packages[@]}" || echo "system_packages.sh: ${packages[*]} could not be installed" >&2
# Debian 13 and later have the headers; Debian 12 can unpack them. The library is from Python's wheel.
if ! install libonnxruntime-dev 2>/dev/null && [ -f /etc/apt/sources.list.d/debian.sources ]; then
  apt=$(mktemp -d)
  mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/cache/archives/partial"
  sed 's/bookworm/trixie/g' /etc/apt/sources.list.d/debian.sources >"$apt/sources/debian.sources"
  options=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$apt/sources"
    -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
  if apt-get "${options[@]}" update -qq >/dev/null &&
    (cd "$apt" && apt-get "${options[@]}" download -qq libonnxruntime-dev >/dev/null &&
      dpkg-deb -x libonnxruntime-dev_*.deb .); then
    export ONNXRUNTIME_INCLUDE_DIR=$apt/usr/include/onnxruntime
  fi
fi
