# Runs `apt-get "$@"`, which installs packages, and starts none of the services that come with them.
#
# nginx and redis are for the tests, which start their own; a machine that had them running keeps
# them. Debian asks policy-rc.d, and 101 means forbidden (invoke-rc.d(8)). The file must not outlive
# this script, or no service that is ever installed here would start: a shell runs its EXIT trap
# after Ctrl-C too, once apt-get has come to a point where it can end. After SIGKILL the next run, or
# `cargo xtask clean`, removes the file: the mark says whose it is.
set -u
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
mark='# made by cargo xtask setup'
if [ ! -e "$policy" ] || grep -qxF "$mark" "$policy"; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$policy"
    chmod 755 "$policy"
fi
# An installation that was interrupted before this one: dpkg says so, and refuses to go on.
if [ -n "$(ls -A /var/lib/dpkg/updates 2>/dev/null)" ]; then
    dpkg --configure -a || exit
fi
apt-get "$@"
