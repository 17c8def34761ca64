// Node's http on an inherited listener.
//
//     takeover run --listen tcp://127.0.0.1:8000 -- node node_server.js {fd}
//
// Started again, it is the deploy.

"use strict";

const http = require("node:http");

// Says which process it is, so that a deploy can be seen.
const server = http.createServer((request, response) => {
  response.setHeader("Content-Type", "text/plain");
  if (!server.listening) response.setHeader("Connection", "close");
  response.end(`${process.pid}\n`);
});

server.listen({ fd: Number(process.argv[2]) });

// close() takes no more connections, closes the idle ones, and ends when the others have ended; without a handler, Node
// would die at once.
process.once("SIGTERM", () => server.close());
