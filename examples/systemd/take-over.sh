#!/bin/sh
# Starts a program that takes over by itself, and returns when it owns the service: with 0, or with the program's own exit
# status if that ends without. For ExecReload= and for deploys by hand; the program goes on in the background.
#
#     take-over.sh CONTROL COMMAND…
control=$1
shift
"$@" &
new=$!
trap 'kill "$new"' TERM INT
while kill -0 "$new" 2>/dev/null; do
    if ${TAKEOVER:-venv/bin/takeover} status --control "$control" --json 2>/dev/null | grep -q "^  \"pid\": $new,"; then
        exit 0
    fi
    sleep 0.2
done
wait "$new"
