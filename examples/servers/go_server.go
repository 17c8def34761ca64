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
	"sync"
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

	var spared sync.WaitGroup
	server := &http.Server{
		Handler:   http.HandlerFunc(which),
		ConnState: func(connection net.Conn, state http.ConnState) { connection.(*conversation).is(state) },
	}
	stopped, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	go func() {
		if err := server.Serve(conversations{listener, &spared}); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	<-stopped.Done()

	limit, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	if err := server.Shutdown(limit); err != nil {
		log.Fatal(err)
	}
	spared.Wait()
}

// conversation is a connection that Server.Shutdown cannot close under a request that has been read.
//
// Shutdown closes what it holds for idle. Between the read of a request and its mark as active lies a moment, in which
// the request would be lost, and its client could not know whether it was carried out. So Close wakes the reader, waits
// until it has read or not, and leaves the connection to its request if there is one: its answer then says
// `Connection: close`.
type conversation struct {
	net.Conn
	spared  *sync.WaitGroup
	reading sync.Mutex
	state   sync.Mutex
	idle    bool // no request since the last answer
	begun   bool // but something of it has been read
	closing bool
	left    bool // to its request, by Close
}

// SetReadDeadline keeps the server's own limits, set between two requests, from undoing the waking of the reader.
func (c *conversation) SetReadDeadline(limit time.Time) error {
	c.state.Lock()
	defer c.state.Unlock()
	if c.closing {
		return nil
	}
	return c.Conn.SetReadDeadline(limit)
}

func (c *conversation) Read(into []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	count, err := c.Conn.Read(into)
	if count > 0 {
		c.state.Lock()
		c.begun = true
		c.state.Unlock()
	}
	return count, err
}

func (c *conversation) Close() error {
	c.state.Lock()
	c.closing = true
	c.Conn.SetReadDeadline(time.Unix(1, 0)) // wakes Read
	c.state.Unlock()
	c.reading.Lock()
	defer c.reading.Unlock()
	c.state.Lock()
	defer c.state.Unlock()
	if !c.idle || !c.begun {
		return c.Conn.Close()
	}
	c.left, c.closing = true, false
	c.spared.Add(1)
	return c.Conn.SetReadDeadline(time.Time{})
}

func (c *conversation) is(state http.ConnState) {
	c.state.Lock()
	defer c.state.Unlock()
	c.idle = state == http.StateIdle
	c.begun = c.begun && !c.idle
	if state == http.StateClosed && c.left {
		c.spared.Done()
	}
}

type conversations struct {
	net.Listener
	spared *sync.WaitGroup
}

func (l conversations) Accept() (net.Conn, error) {
	connection, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conversation{Conn: connection, spared: l.spared}, nil
}

// which says which process it is, so that a deploy can be seen.
func which(response http.ResponseWriter, _ *http.Request) {
	response.Header().Set("Content-Type", "text/plain")
	fmt.Fprintf(response, "%d\n", os.Getpid())
}
