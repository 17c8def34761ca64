#!/bin/sh
# Keeps a server running with nothing but a shell: starts it again when it ends. A HUP to this shell is the deploy, a TERM
# the end. Once more with the words of docs/systemd.md: nobody is refused while the command is replaced.
cd /srv/app || exit 1
trap 'ended=yes; kill -TERM "$pid"' TERM INT
trap 'kill -HUP "$pid"' HUP
while [ -z "$ended" ]; do
    venv/bin/takeover run --control /srv/app/takeover.sock --listen tcp://0.0.0.0:8000 -- \
        sh -c 'cd /srv/app/current && exec venv/bin/uvicorn app:app --fd {fd}' &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" # returns with each signal that was trapped, too
    done
    [ -n "$ended" ] || sleep 1
done
