#!/usr/bin/env bash
# Gives the guestbook a user and a database of its own, once there is a primary to do it on. May run any number of times.
set -euo pipefail

export PGHOST=postgres-1,postgres-2,postgres-3 PGPORT=5432 PGUSER=postgres PGCONNECT_TIMEOUT=3
export PGTARGETSESSIONATTRS=read-write

ask() { psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 --set=password="$GUESTBOOK_PASSWORD" "$@"; }

until ask --command='SELECT 1' >/dev/null 2>&1; do sleep 1; done
[[ -n $(ask --command="SELECT 1 FROM pg_roles WHERE rolname = 'guestbook'") ]] || ask <<<'CREATE ROLE guestbook LOGIN;'
ask <<<"ALTER ROLE guestbook PASSWORD :'password';"
[[ -n $(ask --command="SELECT 1 FROM pg_database WHERE datname = 'guestbook'") ]] || ask <<<'CREATE DATABASE guestbook OWNER guestbook;'
