"""The same echo server on each loop: each binds an ephemeral port of 127.0.0.1 and prints it."""
