#!/usr/bin/env bash
# The quick gate. It writes nothing in the source tree; `make fix` repairs most of what it finds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The crates that have a pure half.
readonly halves=(bots-core postgres-bot content-bot web-bot edge-bot)
# What must not be in the tree of a pure half: runtimes, networks, clocks, randomness, the kernel.
readonly impure='^(tokio|hyper|axum|tonic|etcd-client|git2|rand|getrandom|fastrand|rustix|mio|socket2|tracing-subscriber)([-_ ].*)?$'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

main() {
    check 'format' cargo fmt --all --check
    check 'lints' cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
    check 'lints of the pure halves' cargo clippy --locked --quiet "${halves[@]/#/--package=}" --no-default-features --lib -- -D warnings
    for package in "${halves[@]}" bots-sim; do check "purity of $package" pure "$package"; done
    check 'no hash maps in pure code' ordered
    check 'references in the documentation' env RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --lib --quiet
    check 'generated documents and transcripts' env -u REWRITE cargo test --locked --quiet "${halves[@]/#/--package=}" --test machine
    optional 'scripts' shellcheck deploy/scripts/*.sh .ci/run
    optional 'licences, sources, duplicates' cargo-deny --offline check --hide-inclusion-graph bans licenses sources

    if [[ ${#failed[@]} -gt 0 ]]; then
        printf 'verify: failed: %s\n' "${failed[@]}" >&2
        exit 1
    fi
    echo 'verify: all is well'
}

# check WHAT COMMAND...: says what is looked at, shows the command's output only if it fails, and goes on.
check() {
    local what=$1
    shift
    printf '%-45s ' "$what"
    if "$@" >"$scratch/output" 2>&1; then
        echo ok
    else
        echo FAILED
        cat "$scratch/output" >&2
        failed+=("$what")
    fi
}

# The same for a tool that not every machine has.
optional() {
    if command -v "$2" >/dev/null; then check "$@"; else printf '%-45s %s\n' "$1" "skipped: no $2"; fi
}

# Fails closed: a tree that cannot be read, or is empty, is not a pure one.
pure() {
    cargo tree --locked --package "$1" --no-default-features --edges normal --prefix none >"$scratch/tree" || return
    grep -q "^$1 " "$scratch/tree" || { echo "the tree of $1 does not show $1"; return 1; }
    absent "$impure" "$scratch/tree"
}

# Iteration over a hash map differs from run to run, and a simulation with it.
ordered() {
    absent '\b(HashMap|HashSet)\b' --recursive --line-number --include='*.rs' crates/*/src/machine crates/core/src/dcs \
        crates/core/src/leadership.rs crates/core/src/membership.rs crates/sim/src
}

# grep says 1 for "nothing found" and 2 for "could not look": only the first is good.
absent() {
    local status=0
    grep --extended-regexp "$@" || status=$?
    [[ $status -eq 1 ]]
}

main
