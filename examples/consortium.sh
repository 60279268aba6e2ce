#!/usr/bin/env bash
# From nothing to a finished study of three hospitals on this machine, each a process of its own: `make consortium`.
# The same commands as in the README, with a folder for each time, a look at the port, and nothing left running.
#
#     examples/consortium.sh [FOLDER [STUDY.toml [CONSORTIUM.toml]]]
set -euo pipefail

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
demo=${1:-runs/consortium-$(date +%Y%m%d-%H%M%S)}
study=${2:-$examples/three-hospitals.toml}
consortium=${3:-$examples/consortium.toml}

port=$(sed -n 's/^port *= *\([0-9]*\).*/\1/p' "$consortium")
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "Expected port $port of this machine to be free, got a service that answers there; stop it, or name another" \
        "port in a copy of $consortium: examples/consortium.sh FOLDER STUDY.toml COPY.toml" >&2
    exit 1
fi
if [ -e "$demo" ]; then
    echo "Expected a new folder, got $demo, which is there already; name another." >&2
    exit 1
fi
mkdir -p "$demo"

server="" sites=""
stop() { # exactly what was started here: sites first, which say goodbye to the server; nothing is lost by a kill -9
    local pid tries
    for pid in $sites $server; do kill "$pid" 2>/dev/null || true; done
    for pid in $sites $server; do
        for tries in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            [ "$tries" -lt 100 ] || kill -9 "$pid" 2>/dev/null || true
            sleep 0.2
        done
    done
}
trap stop EXIT

medfed cohort write "$study" "$demo/data"
medfed provision "$consortium" --out "$demo/consortium"
for site in north east south; do
    medfed site init "$demo/consortium/kits/$site" "$demo/sites/$site" --data "$demo/data/$site/manifest.csv" --epsilon 10 --delta 0.004
done
medfed provision "$consortium" --out "$demo/consortium" --enrol "$demo/sites/north/enrolment.json" --enrol "$demo/sites/east/enrolment.json" --enrol "$demo/sites/south/enrolment.json"
medfed study sign "$study" --consortium "$demo/consortium" --as-consortium
for site in north east south; do
    medfed site approve "$demo/sites/$site" "$demo"/consortium/studies/*.study --yes
done
medfed server start "$demo/consortium" 2>"$demo/server.log" &
server=$!
for site in north east south; do
    medfed site start "$demo/sites/$site" 2>"$demo/$site.log" &
    sites="$sites $!"
done
echo "started: server $server, sites$sites; their logs are $demo/*.log; the first round takes a minute or more"
medfed server run "$demo/consortium" "$demo"/consortium/studies/*.study
medfed server status "$demo/consortium"
medfed site audit-log "$demo/sites/north"
medfed site ledger "$demo/sites/north/state"

echo "run            $demo/consortium/runs/ (report.html, adapter/, metrics.jsonl)"
echo "what left      medfed site audit-log $demo/sites/north"
echo "what was spent medfed site ledger $demo/sites/north/state"
