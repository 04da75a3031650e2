#!/bin/sh
# Runs the checks of one program under Freehold.
# Usage: program_test.sh FREEHOLD LIBFREEHOLD PROGRAM
set -eu
export FREEHOLD_CLI="$PWD/$1" FREEHOLD_LIBRARY="$PWD/$2"
export TMPDIR="$TEST_TMPDIR"
exec tests/programs/run --only "$3"
