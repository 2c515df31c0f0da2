# Toolchain: cross-compile for aarch64 Linux, Android's included, with the compilers in GQSA_TOOLS:
# cc, c++, ar and ranlib, programs that runtime/native/build.sh writes around zig or an Android NDK.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES GQSA_TOOLS)
set(CMAKE_C_COMPILER "${GQSA_TOOLS}/cc")
set(CMAKE_CXX_COMPILER "${GQSA_TOOLS}/c++")
set(CMAKE_AR "${GQSA_TOOLS}/ar")
set(CMAKE_RANLIB "${GQSA_TOOLS}/ranlib")
set(CMAKE_DISABLE_PRECOMPILE_HEADERS ON) # zig's own flags differ from call to call
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
