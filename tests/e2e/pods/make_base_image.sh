#!/bin/bash
# A stand-in for the official Python 3.11 image out of Debian's packages, for machines that can reach no registry. As root.
# usage: make_base_image.sh [FOLDER]      needs podman and debootstrap; a minute or two
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export CONTAINERS_CONF=${CONTAINERS_CONF:-$here/containers.conf}
root=${1:-$(mktemp -d)}
packages=python3,python3-venv,python3-pip,ca-certificates,libgomp1

debootstrap --variant=minbase --include="$packages" bookworm "$root"
# The official image has its Python in /usr/local, where pip may install; a virtual environment there is as good.
rm -f "$root/usr/lib/python3.11/EXTERNALLY-MANAGED"
chroot "$root" python3 -m venv /usr/local
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/usr/share/{doc,man,locale}/* "$root"/etc/{resolv.conf,hostname}
tar --directory "$root" --numeric-owner --exclude='./proc/*' --exclude='./sys/*' --exclude='./dev/*' --create . |
  podman import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' - docker.io/library/python:3.11-slim
[ $# -gt 0 ] || rm -rf "$root"
