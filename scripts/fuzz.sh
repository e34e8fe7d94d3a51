#!/usr/bin/env bash
# libFuzzer over the targets of fuzz/ with the address sanitizer: scripts/fuzz.sh [SECONDS [TARGET...]]
# Needs cargo-fuzz (cargo install --locked cargo-fuzz). What it needs of a nightly compiler the stable one has under RUSTC_BOOTSTRAP=1.
# A line for each target; what was found is kept in fuzz/artifacts, and the script ends with 1. New inputs go to fuzz/target/corpus and not into the seeds.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
seconds=${1:-60}
shift || true
cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is missing: cargo install --locked cargo-fuzz" >&2; exit 2; }
export RUSTC_BOOTSTRAP=1
# The versions of the dependencies that are shipped.
cp ../Cargo.lock Cargo.lock
built=${HEADROOM_FUZZ_TARGET_DIR:-$PWD/target}
cargo fuzz build --target-dir "$built"
if [ $# -eq 0 ]; then mapfile -t targets < <(cargo fuzz list); else targets=("$@"); fi
found=0
for target in "${targets[@]}"; do
    corpus=$built/corpus/$target log=$built/$target.log
    mkdir -p "$corpus"
    code=0
    cargo fuzz run --target-dir "$built" "$target" "$corpus" "corpus/$target" -- \
        -max_total_time="$seconds" -max_len=8192 -timeout=10 >"$log" 2>&1 || code=$?
    runs=$(sed -n 's/^Done \([0-9]*\) runs in \([0-9]*\) second.*/\1 runs in \2 s/p' "$log" | tail -1)
    reached=$(grep -oE 'cov: [0-9]+ ft: [0-9]+ corp: [0-9]+' "$log" | tail -1)
    if [ "$code" -eq 0 ]; then result=ok; else result="FOUND SOMETHING, see $log" found=1; fi
    printf '%-14s %s, %s: %s\n' "$target" "${runs:-ended early}" "${reached:-nothing reached}" "$result"
done
exit "$found"
