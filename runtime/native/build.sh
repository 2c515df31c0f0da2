#!/bin/sh
# Build the native runtime for an architecture into a folder; `gqsa native KIND` calls this.
#   x86_64, aarch64  OUT/gqsa-run, and for another machine than this one OUT/lib, TVM's libraries
#   android-arm64    OUT/linked, the archives that a program for phones is linked from, with the
#                    NDK in ANDROID_NDK, else with zig
# Usage: runtime/native/build.sh x86_64|aarch64|android-arm64 PYTHON OUT
set -eu
[ $# -eq 3 ] || { echo "usage: $0 x86_64|aarch64|android-arm64 PYTHON OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
kind=$1
python=$("$2" -c "import sys; print(sys.executable)")
mkdir -p "$3/work"
out=$(cd "$3" && pwd)
work=$out/work
target=gqsa-run

# Scripts with the names that a toolchain file asks for, around zig or the NDK's programs.
write_tool() {
  printf '#!/bin/sh\nexec %s "$@"\n' "$2" > "$work/tools/$1"
  chmod +x "$work/tools/$1"
}
write_tools() {
  mkdir -p "$work/tools"
  if [ -n "${ANDROID_NDK:-}" ]; then
    bin=$ANDROID_NDK/toolchains/llvm/prebuilt/linux-x86_64/bin
    [ -d "$bin" ] || { echo "$0: ANDROID_NDK is $ANDROID_NDK, which has no $bin" >&2; exit 1; }
    write_tool cc "$bin/aarch64-linux-android28-clang"
    write_tool c++ "$bin/aarch64-linux-android28-clang++"
    write_tool ar "$bin/llvm-ar"
    write_tool ranlib "$bin/llvm-ranlib"
    return
  fi
  zig=$("$python" -c "from gqsa_compiler.toolchain import find_zig; print(find_zig() or '')")
  [ -n "$zig" ] || {
    echo "$0: there is no zig; pip install ziglang, or name an NDK with ANDROID_NDK" >&2
    exit 1
  }
  write_tool cc "$zig cc -target aarch64-linux-musl"
  write_tool c++ "$zig c++ -target aarch64-linux-musl"
  write_tool ar "$zig ar"
  write_tool ranlib "$zig ranlib"
}

if [ "$kind" = android-arm64 ]; then
  write_tools
  sh "$here/fetch_sources.sh" "$work"
  target=gqsa-linked
  set -- -DCMAKE_TOOLCHAIN_FILE="$here/android-arm64.cmake" -DGQSA_TOOLS="$work/tools" \
    -DGQSA_LINKED=ON -DGQSA_PCRE2_SOURCE="$work/pcre2" -DGQSA_UTF8PROC_SOURCE="$work/utf8proc" \
    -DNLOHMANN_INCLUDE="$work/json/usr/include"
elif [ "$kind" = "$(uname -m)" ]; then
  set --
elif [ "$kind" = aarch64 ]; then
  sh "$here/fetch_aarch64.sh" "$work" "$python"
  mkdir -p "$out/lib"
  cp "$work"/lib/*.so "$out/lib/"
  set -- -DCMAKE_TOOLCHAIN_FILE="$here/aarch64-linux-gnu.cmake" -DGQSA_SYSROOT="$work/sysroot"
else
  echo "$0: there is no cross-compilation for $kind" >&2
  exit 2
fi
cmake -S "$here" -B "$work/cmake" -DPython3_EXECUTABLE="$python" "$@"
cmake --build "$work/cmake" --target "$target" --parallel 2
if [ "$target" = gqsa-run ]; then
  cmake -E copy "$work/cmake/gqsa-run" "$out/gqsa-run"
else
  cmake -E copy_directory "$work/cmake/linked" "$out/linked"
fi
echo "$out is ready"
