#!/bin/sh
# Build gqsa-run where `gqsa compile --bundle` looks for it: runtime/native/build/ARCH. For another
# architecture than this machine's also fetch TVM's runtime libraries for it.
# Usage: runtime/native/build.sh [x86_64|aarch64] [PYTHON]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
host=$(uname -m)
arch=${1:-$host}
python=$("${2:-python3}" -c "import sys; print(sys.executable)")
out=$here/build/$arch
work=$here/../../build/native/$arch
mkdir -p "$out" "$work"
work=$(cd "$work" && pwd)
if [ "$arch" = "$host" ]; then
  set --
elif [ "$arch" = aarch64 ]; then
  "$here/fetch_aarch64.sh" "$work" "$python"
  mkdir -p "$out/lib"
  cp "$work"/lib/*.so "$out/lib/"
  set -- -DCMAKE_TOOLCHAIN_FILE="$here/aarch64-linux-gnu.cmake" -DGQSA_SYSROOT="$work/sysroot"
else
  echo "$0: there is no cross-compilation for $arch" >&2
  exit 2
fi
cmake -S "$here" -B "$work/cmake" -DPython3_EXECUTABLE="$python" "$@"
cmake --build "$work/cmake" --target gqsa-run --parallel 2
cmake -E copy "$work/cmake/gqsa-run" "$out/gqsa-run"
echo "$out/gqsa-run is ready"
