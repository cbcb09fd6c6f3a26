#!/usr/bin/env bash
# Installs what the build, the tests and the demo need and this machine lacks, from the distribution's own packages:
# Debian 12 and 13, Ubuntu 22.04 and 24.04. Silent, and done in milliseconds, when nothing lacks.
#
# usage: setup.sh [--packages] [--with-nginx] [--with-varnish] [--with-sshd]
#   --packages: leave Rust alone (for root, on behalf of an ordinary user)
#   --with-nginx: nginx and wrk too, which `make bench-web` compares with
#   --with-varnish: Varnish too, which one test of `make test` purges
#   --with-sshd: sshd and ssh-keygen too, from which one test of `make test` fetches
#
# As root, or with a sudo that asks nothing, it installs; otherwise it prints the one command to run. It never starts a
# system service, never creates a Postgres cluster, and leaves those that exist alone.
# Exit codes: 0 all is there; 1 the installation failed; 2 somebody must run the command that it printed.
set -euo pipefail

# The workspace's rust-version (Cargo.toml).
readonly RUST_MIN_MINOR=90
self=$(readlink -f "${BASH_SOURCE[0]}")
readonly self
# What else was asked for: --with-nginx, --with-varnish, --with-sshd.
extras=()

main() {
    local packages_only='' argument
    for argument in "$@"; do
        case "$argument" in
        --packages) packages_only=yes ;;
        --with-nginx | --with-varnish | --with-sshd) extras+=("$argument") ;;
        *)
            echo "usage: setup.sh [--packages] [--with-nginx] [--with-varnish] [--with-sshd]" >&2
            exit 2
            ;;
        esac
    done

    local missing
    missing=$(missing_packages)
    if [[ -n $missing ]]; then
        if [[ $EUID -eq 0 ]]; then
            # shellcheck disable=SC2086 # a list of names
            install_packages $missing
        elif sudo -n true 2>/dev/null; then
            sudo -n "$self" --packages "${extras[@]}"
        else
            ask_for_packages "$missing"
        fi
        missing=$(missing_packages)
        if [[ -n $missing ]]; then
            echo "setup: still missing after the installation: $(one_line "$missing")" >&2
            exit 1
        fi
    fi
    [[ -n $packages_only ]] || check_rust
}

# The packages whose files are not found, one a line. Files are looked at, not the package database: what was installed
# by another way counts.
missing_packages() {
    need protobuf-compiler command protoc
    need libprotobuf-dev file /usr/include/google/protobuf/empty.proto /usr/local/include/google/protobuf/empty.proto
    need pkg-config command pkg-config
    need libssl-dev file /usr/include/openssl/ssl.h /usr/local/include/openssl/ssl.h
    need gcc command cc
    need libc6-dev file /usr/include/stdlib.h
    need make command make
    need git command git
    need curl command curl
    need gpg command gpg
    need ca-certificates file /etc/ssl/certs/ca-certificates.crt
    need etcd-server command etcd
    need etcd-client command etcdctl
    need haproxy command haproxy
    local extra
    for extra in "${extras[@]}"; do
        case "$extra" in
        --with-nginx)
            need nginx command nginx
            need wrk command wrk
            ;;
        --with-varnish) need varnish command varnishd ;;
        --with-sshd) need openssh-server command sshd ;;
        esac
    done
    command -v postgres >/dev/null || need postgresql file /usr/lib/postgresql/*/bin/postgres
}

# need PACKAGE command NAME | need PACKAGE file PATH...
need() {
    local package=$1 kind=$2 path
    shift 2
    # Servers live in /usr/sbin, which is not on every user's PATH.
    if [[ $kind == command ]]; then
        PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin command -v "$1" >/dev/null && return 0
    else
        for path in "$@"; do [[ -e $path ]] && return 0; done
    fi
    echo "$package"
}

one_line() { tr '\n' ' ' <<<"$1" | sed 's/ *$//'; }

ask_for_packages() {
    local how="$self --packages${extras[*]:+ ${extras[*]}}"
    if command -v sudo >/dev/null; then how="sudo $how"; else how="su -c '$how'"; fi
    command -v apt-get >/dev/null || how="install, with this system's package manager, what Debian calls: $(one_line "$1")"
    {
        echo "setup: missing: $(one_line "$1")"
        echo "setup: run this once, then try again:"
        echo "    $how"
    } >&2
    exit 2
}

install_packages() {
    command -v apt-get >/dev/null || ask_for_packages "$(printf '%s\n' "$@")"
    # Two runs at once would undo each other's precautions.
    mkdir -p /run/lock
    exec 9>/run/lock/bots-setup.lock
    flock 9
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    echo "setup: installing $*" >&2
    trap restore EXIT
    keep_services_down

    local packages
    mapfile -t packages < <(rename "$@")
    if ! installable "${packages[@]}" || ! apt_install "${packages[@]}"; then
        # The lists are absent or older than the archive.
        apt-get update -qq
        mapfile -t packages < <(rename "$@")
        apt_install "${packages[@]}"
    fi
    for service in etcd haproxy nginx varnish; do
        [[ " ${packages[*]} " != *" $service"* ]] || stay_down_at_boot "$service.service"
    done
    # Ubuntu has the socket opened at boot, and the service follows it.
    for unit in ssh.service ssh.socket; do
        [[ " ${packages[*]} " != *" openssh-server "* ]] || stay_down_at_boot "$unit"
    done
    [[ " ${packages[*]} " != *" varnish "* ]] || stay_down_at_boot varnishncsa.service
    restore
    trap - EXIT
}

stay_down_at_boot() { ! command -v systemctl >/dev/null || systemctl disable --quiet "$1" 2>/dev/null || true; }

apt_install() {
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" >&2
}

installable() { apt-get install --simulate --no-install-recommends "$@" >/dev/null 2>&1; }

# Releases that do not split etcd have client and server in one package.
rename() {
    local package
    for package in "$@"; do
        if [[ $package == etcd-* ]] && ! known "$package" && known etcd; then package=etcd; fi
        echo "$package"
    done | sort -u
}

known() { [[ -n $(apt-cache madison "$1" 2>/dev/null) ]]; }

# Package scripts ask policy-rc.d before they start a service (101: do not), and createcluster.d before they create the
# cluster `main`. Both are put back as they were.
readonly policy=/usr/sbin/policy-rc.d
readonly no_main=/etc/postgresql-common/createcluster.d/bots-setup.conf

keep_services_down() {
    [[ ! -e $policy || -e $policy.bots-setup ]] || mv "$policy" "$policy.bots-setup"
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    mkdir -p "$(dirname "$no_main")"
    echo 'create_main_cluster = false' >"$no_main"
}

restore() {
    rm -f "$policy" "$no_main"
    [[ ! -e $policy.bots-setup ]] || mv "$policy.bots-setup" "$policy"
}

check_rust() {
    local version minor
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    if version=$(rustc --version 2>/dev/null) && command -v cargo >/dev/null; then
        minor=$(sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p' <<<"$version")
        [[ ${minor:-0} -lt $RUST_MIN_MINOR ]] || return 0
        echo "setup: $version is too old: 1.$RUST_MIN_MINOR or newer is needed" >&2
    else
        echo "setup: Rust is missing (1.$RUST_MIN_MINOR or newer; the distribution's is older)" >&2
    fi
    echo "setup: run this once, then try again:" >&2
    if command -v rustup >/dev/null; then
        echo "    rustup toolchain install stable && rustup default stable" >&2
    else
        echo "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile default" >&2
    fi
    exit 2
}

main "$@"
