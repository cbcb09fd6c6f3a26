#!/usr/bin/env bash
# The container fleet's own test. It starts a fleet under a project name of its own, on free ports, does to it what a bad
# day does, looks at every outcome from outside, and removes everything again, whatever happened.
#
# environment: as of compose.sh; KEEP=1 leaves the containers for a look.
# Exit codes: 0 all held; 1 something did not; 3 skipped: there is no docker here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export BOTS_PROJECT=bots-test-$$
# Port 0: the engine picks a free one, so that a running demo is not in the way.
export ETCD_PORT=0 GIT_PORT=0 POSTGRES_1_PORT=0 POSTGRES_2_PORT=0 POSTGRES_3_PORT=0
export WEB_1_PORT=0 WEB_2_PORT=0 WEB_3_PORT=0 WEB_4_PORT=0
export EDGE_PRIMARY_PORT=0 EDGE_REPLICAS_PORT=0 EDGE_WEB_PORT=0
readonly compose=deploy/scripts/compose.sh
# How long any one reaction of the fleet may take: two leases of 5 s, a promotion and a slow machine.
readonly patience_s=60

scratch=$(mktemp -d)
edge=
passed=0
declare -A containers
urls=()

main() {
    $compose image || exit $?
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    $compose up --detach --no-build >"$scratch/up" 2>&1 || { cat "$scratch/up" >&2; exit 1; }

    look_up
    step 'every service is healthy' $compose wait-healthy
    step 'a page is served' within page_shows '<html'
    step 'an entry is written' within write_entry before-the-failover
    step 'the entry is on the page' within page_shows before-the-failover
    step 'the edge shows the page' within edge_shows before-the-failover
    step 'the edge routes to the primary' within edge_takes_writes
    step 'new content is pushed' push_content
    step 'the new commit is served' within serves_commit
    step 'the entry is still there' within page_shows before-the-failover
    primary=$(leader)
    step "the primary's container ($primary) is killed" docker kill "${containers[$primary]}"
    step 'another member leads' within another_leads "$primary"
    step 'an entry is written after the failover' within write_entry after-the-failover
    step 'the edge routes to the new primary' within edge_takes_writes
    step 'both entries are on the page' within page_shows before-the-failover after-the-failover
    step 'the lost member is started again' docker start "${containers[$primary]}"
    step 'it is back as a replica' within is_replica "$primary"
    step 'the edge shows both entries' within edge_shows before-the-failover after-the-failover
    step 'every service is healthy again' $compose wait-healthy
    printf '%s passed, 0 failed\n' "$passed"
}

# step WHAT COMMAND...: runs it, says how long it took; the first that fails ends the test.
step() {
    local what=$1 start=${EPOCHREALTIME/./}
    shift
    if ! "$@" >"$scratch/output" 2>&1; then
        printf 'FAILED  %s\n' "$what"
        tail -n 30 "$scratch/output" >&2
        $compose exec -T web-1 botctl list >&2 || true
        $compose logs --no-color --tail=30 >&2 || true
        printf '%s passed, 1 failed\n' "$passed"
        exit 1
    fi
    passed=$((passed + 1))
    printf 'ok %7d ms  %s\n' $(((${EPOCHREALTIME/./} - start) / 1000)) "$what"
}

# within COMMAND...: until it succeeds, for as long as our patience lasts.
within() {
    local deadline=$((SECONDS + patience_s))
    until "$@"; do
        [[ $SECONDS -lt $deadline ]] || return 1
        sleep 0.2
    done
}

# The compose tool takes a second for every question: what does not change is asked once.
look_up() {
    local name
    for name in etcd-1 postgres-1 postgres-2 postgres-3 edge-1; do containers[$name]=$($compose ps --quiet "$name"); done
    # Those that idle do not serve pages.
    for name in web-1 web-2 web-3 web-4; do urls+=("http://$($compose port "$name" 8080)/"); done
    edge=http://$($compose port edge-1 8080)/
}

# page FILE: the page of the first web bot that serves one; its headers go into FILE.headers.
page() {
    local url
    for url in "${urls[@]}"; do
        curl --fail --silent --max-time 5 --dump-header "$1.headers" --output "$1" "$url" && return 0
    done
    return 1
}

# page_shows TEXT...
page_shows() {
    page "$scratch/page" && has "$@"
}

# edge_shows TEXT...: the same through the edge.
edge_shows() {
    curl --fail --silent --max-time 5 --output "$scratch/page" "$edge" && has "$@"
}

# has TEXT...: the page that was fetched last.
has() {
    local text
    for text in "$@"; do grep --quiet --fixed-strings --ignore-case "$text" "$scratch/page" || return 1; done
}

# Asked by a member that knows of the edge alone.
edge_takes_writes() {
    local now
    now=$(leader)
    # shellcheck disable=SC2016 # the container's shell has the password
    docker exec "${containers[$now]}" sh -c \
        'PGPASSWORD=$BOT_POSTGRESQL_AUTHENTICATION_SUPERUSER_PASSWORD psql --host=edge-1 --port=5000 --username=postgres --tuples-only --no-align \
            --command="SELECT NOT pg_is_in_recovery()"' sh |
        grep --quiet t
}

write_entry() {
    local url
    for url in "${urls[@]}"; do
        curl --fail --silent --max-time 5 --output /dev/null --data-urlencode "name=compose" --data-urlencode "text=$1" "${url}entries" && return 0
    done
    return 1
}

push_content() {
    local site=$scratch/site
    git clone --quiet "git://$($compose port git 9418)/site.git" "$site"
    echo "pushed by the test" >"$site/pushed.txt"
    git -C "$site" add --all
    git -C "$site" -c user.name=test -c user.email=test@localhost commit --quiet --message='Pushed by the test'
    git -C "$site" push --quiet origin HEAD:main
    git -C "$site" rev-parse HEAD >"$scratch/commit"
}

serves_commit() {
    page "$scratch/page" && grep --quiet --ignore-case "^x-bots-revision: $(<"$scratch/commit")" "$scratch/page.headers"
}

# The member that holds the lock of the Postgres cluster, as etcd says.
leader() { docker exec "${containers[etcd-1]}" etcdctl get --print-value-only /service/main/leader; }

another_leads() {
    local now
    now=$(leader)
    [[ -n $now && $now != "$1" ]]
}

# Asked on the member itself, over TCP, as any client would.
is_replica() {
    # shellcheck disable=SC2016 # the container's shell has the password
    docker exec "${containers[$1]}" sh -c \
        'PGPASSWORD=$BOT_POSTGRESQL_AUTHENTICATION_SUPERUSER_PASSWORD psql --host="$1" --username=postgres --tuples-only --no-align \
            --command="SELECT status FROM pg_stat_wal_receiver WHERE pg_is_in_recovery()"' sh "$1" |
        grep --quiet streaming
}

clean_up() {
    if [[ -z ${KEEP-} ]]; then
        $compose down >/dev/null 2>&1 || echo "compose-test: could not remove project $BOTS_PROJECT" >&2
    else
        echo "compose-test: left running: BOTS_PROJECT=$BOTS_PROJECT $compose ps" >&2
    fi
    rm -rf "$scratch"
}

main
