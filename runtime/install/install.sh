#!/usr/bin/env bash
# Installs Freehold: the command, the libraries, the headers, what pkg-config reads, and the manual page.
#
#   bazel run //:install -- --prefix=DIR [--destdir=DIR]
#
#   --prefix=DIR    where Freehold will be: DIR/bin, DIR/lib, DIR/include/freehold, DIR/share/man. Relative to where the
#                   command was given; without spaces and colons, which LD_PRELOAD cannot have
#   --destdir=DIR   install below DIR what is meant for --prefix; for packages
#
# Files of an earlier installation are replaced, each at once: who runs with the old ones keeps them. Nothing is
# replaced before all files are at hand below the prefix. Nothing else is touched.
set -euo pipefail

fail() {
  printf 'install: %s\n' "$1" >&2
  exit "${2:-1}"
}
usage() { fail "$1; see \`bazel run //:install -- --help\`" 2; }

prefix='' destdir=''
while (( $# > 0 )); do
  case $1 in
    --prefix=*) prefix=${1#*=} ;;
    --destdir=*) destdir=${1#*=} ;;
    --prefix | --destdir)
      (( $# > 1 )) || usage "$1 needs a directory"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) usage "unknown argument '$1'" ;;
  esac
  shift
done
[[ -n $prefix ]] || usage "no --prefix=DIR given"
[[ $prefix != *[[:space:]:]* ]] || usage "--prefix=$prefix has a space or a colon"

# Bazel starts this elsewhere.
from=${BUILD_WORKING_DIRECTORY:-$PWD}
absolute() { if [[ $1 == /* ]]; then realpath -ms -- "$1"; else realpath -ms -- "$from/$1"; fi; }
prefix=$(absolute "$prefix")
[[ $prefix != *[[:space:]:]* ]] || usage "--prefix=$prefix has a space or a colon"
root=$prefix
[[ -z $destdir ]] || root=$(realpath -ms -- "$(absolute "$destdir")/$prefix")
if [[ -d $0.runfiles/freehold ]]; then cd "$0.runfiles/freehold"; fi

version=$(sed -n 's/.*kVersion\[\] = "\(.*\)".*/\1/p' runtime/version.h)
[[ $version == *.*.* ]] || fail "no version in runtime/version.h"

mkdir -p -- "$root" || fail "cannot make the directory $root"
stage=$(mktemp -d -- "$root/.freehold-install.XXXXXX") || fail "cannot write to $root"
trap 'rm -rf -- "$stage"' EXIT

# stage_file MODE SOURCE DESTINATION
stage_file() {
  install -D -m "$1" -- "$2" "$stage/$3" || fail "cannot write below $root"
}
# stage_text DESTINATION: from standard input.
stage_text() {
  mkdir -p -- "$stage/${1%/*}" && cat > "$stage/$1" && chmod 644 "$stage/$1" || fail "cannot write below $root"
}

stage_file 755 runtime/cli/freehold bin/freehold
stage_file 755 runtime/shim/libfreehold.so "lib/libfreehold.so.$version"
ln -s "libfreehold.so.$version" "$stage/lib/libfreehold.so.0"
ln -s libfreehold.so.0 "$stage/lib/libfreehold.so"
stage_file 644 runtime/install/libfreehold.a lib/libfreehold.a
for name in freehold freehold-static; do
  sed -e "s|@PREFIX@|${prefix//&/\\&}|" -e "s|@VERSION@|$version|" "runtime/install/$name.pc.in" |
    stage_text "lib/pkgconfig/$name.pc"
done
for header in freehold.h freehold.hpp; do
  stage_file 644 "runtime/$header" "include/freehold/$header"
done
while read -r header; do
  stage_file 644 "$header" "include/freehold/$header"
done < runtime/install/headers.txt
sed "s|@VERSION@|$version|" runtime/install/freehold.1 | stage_text share/man/man1/freehold.1

files=$(cd "$stage" && find . ! -type d -printf '%P\n')
while read -r file; do
  [[ ! -d $root/$file || -L $root/$file ]] || fail "$root/$file is a directory"
done <<< "$files"
while read -r file; do
  mkdir -p -- "$root/${file%/*}" && mv -fT -- "$stage/$file" "$root/$file" || fail "cannot write $root/$file"
done <<< "$files"
printf 'install: Freehold %s is in %s\n' "$version" "$root"
