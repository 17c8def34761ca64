"""`takeover run`: any server, in any language, under a supervisor that takes over from its predecessor."""
