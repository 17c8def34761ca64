"""Puts descriptors on their way between two sockets, as any process of a user may, and takes them back, when told."""

import array
import json
import os
import socket
import sys

wishes = json.loads(sys.argv[1])
os.setuid(wishes["uid"])
sys.stdin.readline()
ours, theirs = socket.socketpair()
descriptors = [os.open("/dev/null", os.O_RDONLY)] * wishes["count"]
while descriptors:
    batch = array.array("i", descriptors[:250])
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])
    del descriptors[:250]
print("clogged", flush=True)
sys.stdin.readline()
theirs.close()
ours.close()
print("free", flush=True)
