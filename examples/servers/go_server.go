// Go's net/http on an inherited listener.
//
//	go build go_server.go
//
//	takeover run --listen tcp://127.0.0.1:8000 -- ./go_server {fd}
//
// Started again, it is the deploy.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	descriptor, err := strconv.Atoi(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	file := os.NewFile(uintptr(descriptor), "listener")
	listener, err := net.FileListener(file) // a copy of its own
	if err != nil {
		log.Fatal(err)
	}
	file.Close()

	server := &http.Server{Handler: http.HandlerFunc(which)}
	stopped, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	go func() {
		if err := server.Serve(listener); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	<-stopped.Done()

	limit, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	if err := server.Shutdown(limit); err != nil {
		log.Fatal(err)
	}
}

// which says which process it is, so that a deploy can be seen.
func which(response http.ResponseWriter, _ *http.Request) {
	response.Header().Set("Content-Type", "text/plain")
	fmt.Fprintf(response, "%d\n", os.Getpid())
}
