#!/usr/bin/env bash
# Compiles the programs that are deployed and puts them into target/dist/bin, stripped: what an image or a package takes.
#
# usage: dist.sh [release | dev]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly programs=(postgres-bot content-bot web-bot edge-bot botctl guestbook)
profile=${1:-release}
case $profile in
release) built=release ;;
dev) built=debug ;;
*)
    echo "usage: dist.sh [release | dev]" >&2
    exit 2
    ;;
esac

# The development profile shares the workspace's build; the other has only what is deployed in it.
if [[ $profile == dev ]]; then
    cargo build --locked --workspace --bins
else
    cargo build --locked --profile "$profile" "${programs[@]/#/--package=}" --bins
fi
rm -rf target/dist
mkdir -p target/dist/bin
for program in "${programs[@]}"; do
    install -m 755 "${CARGO_TARGET_DIR:-target}/$built/$program" target/dist/bin/
done
strip --strip-debug target/dist/bin/*
