#!/bin/sh
# Fetch the sources of what gqsa-run links to, for systems that no Linux distribution has packages
# for, into DEST/pcre2, DEST/utf8proc and DEST/json: those that Debian's packages are made from, so
# that their versions are those of the other builds. Debian, no root.
# Usage: runtime/native/fetch_sources.sh DEST
set -eu
[ $# -eq 1 ] || { echo "usage: $0 DEST" >&2; exit 2; }
cd "$1"
if [ -d pcre2 ] && [ -d utf8proc ] && [ -d json ]; then exit 0; fi
rm -rf apt pcre2 utf8proc json

# Lists of our own: the system's apt need not know about sources.
mkdir -p apt/lists/partial apt/cache/archives/partial apt/sources
: > apt/status
. /etc/os-release
for type in deb deb-src; do
  echo "$type http://deb.debian.org/debian ${VERSION_CODENAME:-bookworm} main"
done > apt/sources.list
set -- -o APT::Sandbox::User="$(id -un)" -o Dir::State::Lists="$PWD/apt/lists" \
  -o Dir::State::status="$PWD/apt/status" -o Dir::Cache="$PWD/apt/cache" \
  -o Dir::Etc::sourcelist="$PWD/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
apt-get "$@" -qq update
(cd apt/sources && apt-get "$@" -qq --download-only source pcre2 utf8proc)
(cd apt && apt-get "$@" -qq download nlohmann-json3-dev)
for name in pcre2 utf8proc; do
  mkdir $name
  tar -xf apt/sources/${name}_*.orig.tar.* -C $name --strip-components=1
done
dpkg -x apt/nlohmann-json3-dev*.deb json
rm -rf apt
