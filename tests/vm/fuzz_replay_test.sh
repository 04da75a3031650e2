#!/usr/bin/env bash
# The fuzz target on its seed corpus, without a fuzzer; and a file that is not there is an error.
set -euo pipefail
corpus=$TEST_TMPDIR/corpus
mkdir "$corpus"
tests/vm/fuzz_corpus "$corpus"
: >"$corpus/empty"
tests/vm/address_space_fuzz_replay "$corpus"/* | tail -1 | grep -x fine
tests/vm/address_space_fuzz_replay --seed 7 >"$TEST_TMPDIR/seed"
tests/vm/address_space_fuzz_replay --shrink "$TEST_TMPDIR/seed" | tail -1 | grep -x fine
if tests/vm/address_space_fuzz_replay "$corpus/absent" 2>/dev/null; then exit 1; fi
if tests/vm/fuzz_corpus "$corpus/absent" 2>/dev/null; then exit 1; fi
