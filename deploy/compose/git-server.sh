#!/usr/bin/env bash
# The demo's git server: one bare repository, seeded with the sample site, that anybody on the fleet's network may push
# to. Every push is announced to the content bot at BOT_PUSH_URL, signed with the shared secret BOT_PUSH_SECRET.
set -euo pipefail

readonly repository=/srv/git/site.git
export GIT_AUTHOR_NAME=demo GIT_AUTHOR_EMAIL=demo@localhost GIT_COMMITTER_NAME=demo GIT_COMMITTER_EMAIL=demo@localhost
export BOT_PUSH_URL=${BOT_PUSH_URL:-http://content-1:8008/push/site/standard}

if [[ ! -e $repository/HEAD ]]; then
    seed=$(mktemp -d)
    cp -R /usr/share/bots/site/. "$seed"
    git -C "$seed" init --quiet --initial-branch=main
    git -C "$seed" add --all
    git -C "$seed" commit --quiet --message='The sample site'
    # Complete or not there at all: a container may be killed at any time.
    rm -rf "$repository.new"
    git clone --quiet --bare "$seed" "$repository.new"
    install -m 755 /etc/bots/post-receive "$repository.new/hooks/post-receive"
    mv "$repository.new" "$repository"
    rm -rf "$seed"
fi
exec git daemon --reuseaddr --export-all --enable=receive-pack --base-path=/srv/git /srv/git
