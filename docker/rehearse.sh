#!/usr/bin/env bash
# Both images built and the consortium of docker/README.md run in them, where neither Docker nor an image registry is:
# podman, as Debian packages it, on a base image made of Debian's own Python 3.11. Root, and 6 GB under FOLDER.
#
#     docker/rehearse.sh FOLDER      what FOLDER holds from an earlier start (base, images) is taken as it is
#
# The Dockerfiles, compose.yaml and the README's commands are executed as they stand: this script knows none of their
# steps. What it adds: pip's settings of this machine during the build, a network namespace for all containers, the
# clock that has podman ask for health where systemd does not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mkdir -p "${1:?a folder}" && cd "$1" && pwd)
chmod 755 "$work" # the person below works in it
base=localhost/python:3.11-slim-bookworm
person=4711 # who types the README's commands: not root, and not the user of an image
needed="debootstrap podman runc netavark aardvark-dns catatonit iptables iproute2 python3-venv"

fail() {
    echo "$*" >&2
    exit 1
}

if [ -z "${REHEARSAL_NETWORK:-}" ]; then # the rest runs in a network namespace that goes when it ends
    [ "$(id -u)" = 0 ] || fail "Expected root, got user $(id -u); a base image is made by debootstrap, which needs it."
    for package in $needed; do
        dpkg -s "$package" >/dev/null 2>&1 || fail "Expected $package, got none: apt-get install --no-install-recommends $needed"
    done
    free=$(df --output=avail -B1G "$work" | tail -1)
    [ "$free" -ge 6 ] || fail "Expected 6 GB free under $work, got $free."
fi

SECONDS=${REHEARSAL_SECONDS:-0}
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"] # those of podman may be more than root has here
init_path = "/usr/bin/catatonit"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "$work/networks"
END
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/store"\nrunroot = "%s/run"\n' "$work" "$work" >"$work/storage.conf"
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf

make_base() {
    podman image exists "$base" && return
    step "base image: Debian with its Python"
    debootstrap --variant=minbase --include=python3,python3-venv,python-is-python3 bookworm "$work/base" >"$work/base.log" 2>&1 ||
        fail "Expected a Debian, got: $(tail -1 "$work/base.log")"
    tar --directory "$work/base" --create . | podman import --quiet - "$base"
    rm -rf "$work/base"
}

build() { # image
    podman image exists "medfed-$1:0.1.0" && return
    step "image of the $1"
    local path paths mounts=()
    paths=$(python3 "$root/docker/pip_settings.py" "$work/pip.conf")
    for path in "$work/pip.conf:/etc/pip.conf" $paths; do
        case $path in *:*) ;; *) path=$path:$path ;; esac
        mounts+=(--volume "$path:ro")
    done
    podman build --isolation chroot --format docker --pull=never --layers --build-arg "BASE=$base" "${mounts[@]}" \
        --file "$root/docker/$1.Dockerfile" --tag "medfed-$1:0.1.0" "$root" >"$work/$1.log" 2>&1 ||
        fail "Expected an image, got: $(tail -3 "$work/$1.log"); all of it: $work/$1.log"
}

if [ -z "${REHEARSAL_NETWORK:-}" ]; then
    make_base
    build server
    build site
    [ -x "$work/compose/bin/podman-compose" ] || { # reads compose.yaml and calls podman
        /usr/bin/python3 -m venv "$work/compose" # user 4711 runs it, who may not see another Python
        "$work/compose/bin/python" -m pip install --quiet podman-compose
    }
    REHEARSAL_SECONDS=$SECONDS REHEARSAL_NETWORK=own exec unshare --net "${BASH_SOURCE[0]}" "$work"
fi

ip link set lo up
trap 'podman rm --all --force --time 30 >/dev/null 2>&1; kill $(jobs -p) 2>/dev/null || true; wait' EXIT
hardened=(--rm --no-healthcheck --read-only --read-only-tmpfs=false --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --network none)
for image in server site; do
    step "image of the $image, alone: its user, what it may write, its help, its health check without anything to check"
    podman run "${hardened[@]}" --entrypoint sh "medfed-$image:0.1.0" -euc '
        id
        test "$(id -u)" != 0
        for place in / /opt/medfed /usr /etc /var /run /home; do ! touch $place/x 2>/dev/null || { echo "writes to $place"; exit 1; }; done
        for place in /tmp /var/lib/medfed; do touch $place/x; done
        python -c "import torch; print(\"torch\", torch.__version__)"
        medfed --version'
    podman run "${hardened[@]}" "medfed-$image:0.1.0" | sed -n 1,4p
    check=$(podman image inspect --format '{{join .HealthCheck.Test " "}}' "medfed-$image:0.1.0")
    said=$(podman run "${hardened[@]}" "medfed-$image:0.1.0" ${check#CMD medfed } 2>&1) && fail "Expected that nothing is healthy, got: $said"
    echo "$check: $said"
done

step "the README's commands, by user $person"
tree=$work/tree
rm -rf "$tree" "$work/podman.sock"
mkdir "$tree"
git -C "$root" ls-files -z docker examples | tar --directory "$root" --null --files-from - --create | tar --directory "$tree" --extract --no-same-owner
sed -n '/^## A consortium on one host/,/^## /{/^```$/,/^```$/{/^```/!p}}' "$root/docker/README.md" >"$tree/commands"
[ -s "$tree/commands" ] || fail "Expected commands under 'A consortium on one host' in docker/README.md, got none."
chown -R $person:$person "$tree"
podman system service --time 0 "unix://$work/podman.sock" 2>"$work/service.log" &
until [ -S "$work/podman.sock" ]; do sleep 0.2; done
chown $person "$work/podman.sock"
while sleep 5; do # systemd's part
    for container in $(podman ps --quiet); do
        [ "$(podman inspect --format '{{if .Config.Healthcheck}}y{{end}}' "$container")" = y ] && podman healthcheck run "$container" >/dev/null 2>&1 || true
    done
done &
# What `docker` is to the commands: the engine over its socket. The images are there; a built one is not built again.
# As with Docker, `run` is enough to ask for a service of a profile; a person answers where one is asked.
cat >"$tree/as-typed" <<'END'
compose() { "$REHEARSAL_COMPOSE" --in-pod false "$@"; }
docker() {
    printf '\n$ docker %s\n' "$*"
    case $* in
        "compose build "*) ;;
        "compose run "*" site approve "*) COMPOSE_PROFILES=run compose run -T "${@:3}" <<<three-hospitals ;;
        "compose run "*) COMPOSE_PROFILES=run compose run -T "${@:3}" </dev/null ;;
        *) "$@" </dev/null ;;
    esac
}
set -euo pipefail
. ./commands
END
cd "$tree"
status=0
env --ignore-environment PATH="$PATH" HOME="$tree" CONTAINER_HOST="unix://$work/podman.sock" \
    REHEARSAL_COMPOSE="$work/compose/bin/podman-compose" \
    setpriv --reuid $person --regid $person --clear-groups bash ./as-typed || status=$?
[ "$status" = 0 ] || fail "Expected the commands of docker/README.md to end well, got exit code $status; see above."

step "what came of it"
ls -o demo/consortium/runs/*/
test -s "$(echo demo/consortium/runs/*/report.html)"
ready() { podman ps --filter health=healthy --format '{{.Names}}' | sort | tr '\n' ' '; }
for _ in $(seq 60); do
    [ "$(ready | wc -w)" = 4 ] && break
    sleep 5
done
[ "$(ready | wc -w)" = 4 ] || fail "Expected four healthy containers, got: $(ready)"
echo "healthy: $(ready)"
for name in $(ready); do # who runs, as whom, and what the engine lets it do
    podman inspect --format "$name user={{.Config.User}} read-only={{.HostConfig.ReadonlyRootfs}} caps={{.EffectiveCaps}} {{.HostConfig.SecurityOpt}} pids={{.HostConfig.PidsLimit}}" "$name"
    changed=$(podman diff "$name" | grep -v -E '^[AC] /(etc|run|dev|proc|sys|tmp|site|post|data|consortium|var|var/tmp|run/.*|etc/(mtab|hosts|resolv.conf|hostname)|run/.containerenv)?$' || true)
    [ -z "$changed" ] || fail "Expected nothing written beside the volumes of $name, got: $changed"
done
step "all of it holds"
