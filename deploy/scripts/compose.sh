#!/usr/bin/env bash
# The fleet in containers.
#
# usage: compose.sh demo | down | image | COMPOSE-ARGUMENTS...
#   demo    builds the image, starts the fleet, waits until every service is healthy, says where it is
#   down    stops it and forgets its data
#   image   only builds the image
#
# environment: BOTS_PROJECT (default bots), BOTS_IMAGE (bots:local), DIST_PROFILE (release, or dev),
#   BUILD_MODE: `pull` compiles in an image from the registry; `local` needs no registry: base image from Debian's
#   packages, programs compiled here; `auto`, the default, tries the first and falls back to the second; `none` takes
#   BOTS_IMAGE as it is.
# Exit codes: 0 done; 1 failed; 2 usage; 3 skipped: there is no docker here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly project=${BOTS_PROJECT:-bots}
export BOTS_IMAGE=${BOTS_IMAGE:-bots:local}
readonly official_base=${BASE_IMAGE:-debian:bookworm-slim} official_build=${BUILD_IMAGE:-rust:1-bookworm}
readonly local_base=bots-base:local
# Enough for initdb and two clones on a slow disk.
readonly healthy_within_s=300

main() {
    case ${1-} in
    '')
        echo 'usage: compose.sh demo | down | image | COMPOSE-ARGUMENTS...' >&2
        exit 2
        ;;
    demo)
        need_docker
        build_image
        compose up --detach --no-build
        wait_healthy
        say_where
        ;;
    down)
        need_docker
        compose down --volumes --remove-orphans
        ;;
    image)
        need_docker
        build_image
        ;;
    wait-healthy) wait_healthy ;; # only for compose-test.sh
    *) compose "$@" ;;
    esac
}

need_docker() {
    if ! docker info >/dev/null 2>&1; then
        skip "no docker engine answers (docker info): install docker, or let this user talk to it"
    fi
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
        skip "docker is here but neither 'docker compose' nor 'docker-compose' is: install one of them"
}

skip() {
    {
        echo "################ SKIPPED: the container demo did not run ################"
        echo "# $1"
    } >&2
    exit 3
}

# fail WHY [EXIT-CODE]
fail() {
    echo "compose: $1" >&2
    exit "${2:-1}"
}

compose() {
    if docker compose version >/dev/null 2>&1; then
        docker compose --file deploy/docker-compose.yml --project-name "$project" "$@"
    else
        docker-compose --file deploy/docker-compose.yml --project-name "$project" "$@"
    fi
}

build_image() {
    case ${BUILD_MODE:-auto} in
    pull)
        { have "$official_base" && have "$official_build"; } || fail "cannot pull $official_base and $official_build"
        build_from_source
        ;;
    local) build_from_binaries ;;
    none) docker image inspect "$BOTS_IMAGE" >/dev/null || fail "BUILD_MODE=none, but there is no image $BOTS_IMAGE" ;;
    auto)
        if have "$official_base" && have "$official_build"; then
            build_from_source
        else
            echo "compose: no image registry answers: base image from this system's packages, programs compiled here" >&2
            build_from_binaries
        fi
        ;;
    *) fail "BUILD_MODE=$BUILD_MODE: use auto, pull, local or none" 2 ;;
    esac
}

# Whether an image is here or comes from a registry. A registry that is filtered away does not answer at all.
have() { docker image inspect "$1" >/dev/null 2>&1 || timeout 600 docker pull --quiet "$1" >/dev/null 2>&1; }

build_from_source() {
    docker build --quiet --file deploy/Dockerfile --target runtime --tag "$BOTS_IMAGE" \
        --build-arg BASE_IMAGE="$official_base" --build-arg BUILD_IMAGE="$official_build" . >/dev/null
}

build_from_binaries() {
    docker image inspect "$local_base" >/dev/null 2>&1 || deploy/scripts/base-image.sh "$local_base"
    make dist
    DOCKER_BUILDKIT=0 docker build --quiet --file deploy/Dockerfile --target runtime-prebuilt --tag "$BOTS_IMAGE" \
        --build-arg BASE_IMAGE="$local_base" . >/dev/null
}

wait_healthy() {
    local deadline=$((SECONDS + healthy_within_s)) waiting
    echo "compose: waiting until every service is healthy" >&2
    while waiting=$(unhealthy) || exit 1 && [[ -n $waiting ]]; do
        if [[ $SECONDS -ge $deadline ]]; then
            echo "compose: not healthy after $healthy_within_s s: $waiting" >&2
            compose logs --tail 20 >&2
            exit 1
        fi
        sleep 1
    done
}

# The names of the containers that are not healthy yet; one that has done its work and ended is.
unhealthy() {
    local ids format='{{.Name}} {{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}-{{.State.ExitCode}}{{end}}'
    mapfile -t ids < <(compose ps --quiet)
    [[ ${#ids[@]} -gt 0 ]] || fail "no container of project $project is here"
    docker inspect --format "$format" "${ids[@]}" |
        awk '$2 != "healthy" && $2 != "exited-0" { sub("^/", "", $1); printf "%s ", $1 }'
}

say_where() {
    local me=deploy/scripts/compose.sh
    cat <<END

The fleet runs. From this machine (127.0.0.1 only):
  the guestbook   http://127.0.0.1:${EDGE_WEB_PORT:-18080}/    (the bots behind it: :${WEB_1_PORT:-18081} to :${WEB_4_PORT:-18084}; those that idle answer 503)
  the site's git  git clone git://127.0.0.1:${GIT_PORT:-19418}/site.git    then commit and: git push
  the database    psql -h 127.0.0.1 -p ${EDGE_PRIMARY_PORT:-15000} -U postgres    (who follows: -p ${EDGE_REPLICAS_PORT:-15001}; password ${BOTS_DATABASE_PASSWORD:-demo-only})
Look at it:
  $me exec web-1 botctl list
  $me exec web-1 botctl why postgres-1
Break it, and bring it back:
  $me kill postgres-1
  $me start postgres-1
Stop it and forget its data:
  make compose-down
END
}

main "$@"
