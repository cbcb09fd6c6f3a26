#!/usr/bin/env bash
# Makes a base image from the distribution's packages, for machines that reach no image registry. Needs root, debootstrap
# and docker.
#
# usage: base-image.sh IMAGE        environment: SUITE, MIRROR (default: this machine's release, its usual mirror)
#
# The image has this machine's release, so that programs compiled here find their C library in it.
set -euo pipefail

image=${1:?usage: base-image.sh IMAGE}
# shellcheck source=/dev/null
. /etc/os-release
suite=${SUITE:-$VERSION_CODENAME}
case $ID in
ubuntu) usual=http://archive.ubuntu.com/ubuntu components=main,universe ;;
*) usual=http://deb.debian.org/debian components=main ;;
esac
mirror=${MIRROR:-$usual}

if [[ $EUID -ne 0 ]]; then
    if sudo -n true 2>/dev/null; then exec sudo -n SUITE="$suite" MIRROR="$mirror" "$(readlink -f "$0")" "$image"; fi
    echo "base-image: only root can unpack a system: run once: sudo $(readlink -f "$0") $image" >&2
    exit 2
fi
if ! command -v debootstrap >/dev/null; then
    # Somebody else may be installing: setup.sh waits as long.
    install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 debootstrap)
    "${install[@]}" >/dev/null || { apt-get update -qq && "${install[@]}" >/dev/null; }
fi

root=$(mktemp -d "${TMPDIR:-/var/tmp}/bots-base.XXXXXX")
trap 'rm -rf --one-file-system "$root"' EXIT
echo "base-image: $image from the packages of $ID $suite ($mirror)" >&2
if ! debootstrap --variant=minbase --components="$components" "$suite" "$root" "$mirror" >"$root.log" 2>&1; then
    tail -n 20 "$root.log" >&2
    echo "base-image: debootstrap failed; its log is $root.log" >&2
    exit 1
fi
rm -f "$root.log" "$root"/var/cache/apt/archives/*.deb
tar --directory "$root" --create . | docker import --change 'CMD ["bash"]' - "$image" >/dev/null
