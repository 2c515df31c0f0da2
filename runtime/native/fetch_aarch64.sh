#!/bin/sh
# Fetch what cross-compiling for aarch64 Linux needs, into a folder of its own (Debian, no root):
#   DEST/sysroot  the headers and static libraries that gqsa-run links to (Debian's arm64 packages)
#   DEST/lib      TVM's runtime libraries for aarch64, of the same release as PYTHON's
# Usage: runtime/native/fetch_aarch64.sh DEST [PYTHON]
set -eu
[ $# -ge 1 ] || { echo "usage: $0 DEST [PYTHON]" >&2; exit 2; }
python=$("${2:-python3}" -c "import sys; print(sys.executable)")
mkdir -p "$1"
cd "$1"

# Debian's packages, with lists of our own: the system's apt need not know arm64.
mkdir -p apt/lists/partial apt/cache/archives/partial sysroot lib wheels
: > apt/status
set -- -o APT::Architecture=arm64 -o APT::Architectures::=arm64 \
  -o APT::Sandbox::User="$(id -un)" -o Dir::State::Lists="$PWD/apt/lists" \
  -o Dir::State::status="$PWD/apt/status" -o Dir::Cache="$PWD/apt/cache"
apt-get "$@" -qq update
(cd apt && apt-get "$@" -qq download nlohmann-json3-dev libpcre2-dev:arm64 libutf8proc-dev:arm64)
for package in apt/*.deb; do dpkg -x "$package" sysroot; done

# The libraries of the aarch64 wheels.
version() { "$python" -c "from importlib.metadata import version; print(version('$1'))"; }
tag=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$tag" \
  --platform manylinux_2_28_aarch64 --dest wheels \
  "apache-tvm==$(version apache-tvm)" "apache-tvm-ffi==$(version apache-tvm-ffi)"
"$python" - <<'PYTHON'
import zipfile
from pathlib import Path

names = {"libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so"}
for wheel in Path("wheels").glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = Path(member).name
            if name in names and Path(member).parent.name == "lib":
                (Path("lib") / name).write_bytes(archive.read(member))
                names.discard(name)
if names:
    raise SystemExit(f"not in the wheels: {', '.join(sorted(names))}")
PYTHON
rm -rf wheels apt
echo "$PWD/sysroot and $PWD/lib are ready"
