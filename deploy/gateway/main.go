// The gateway: OpenAI's HTTP API in front of Tandem's frontends. docs/rest.md says what it does.
//
//go:debug default=go1.24
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"google.golang.org/grpc/grpclog"

	"tandem/gateway/internal/faults"
	"tandem/gateway/internal/front"
	"tandem/gateway/internal/tlsfiles"
	"tandem/gateway/internal/upstream"
)

// collectAt has the collector run when the heap is five times what is in use: there is little in
// it, and collecting rarely costs a third less CPU.
const collectAt = 400

// farewell is how long streams that are cut at the end of the drain have for their last event.
const farewell = time.Second

func main() {
	flags, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		os.Exit(2) // parse has said why
	}
	if err := run(flags); err != nil {
		fmt.Fprintln(os.Stderr, "tandem-gateway:", err)
		os.Exit(1)
	}
}

func run(f *flags) error {
	slog.SetDefault(slog.New(handler(f.logFormat)))
	// gRPC's own lines name what requests can't know; its errors come back as statuses.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(quiet{}, quiet{}, quiet{}))
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
	stop := make(chan os.Signal, 2)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)

	frontendTLS, err := f.frontendTLS()
	if err != nil {
		return err
	}
	conn, err := upstream.Dial(f.frontends, frontendTLS)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.Connect()
	door, err := front.New(conn, f.options())
	if err != nil {
		return err
	}
	serving, endAll := context.WithCancelCause(context.Background())
	defer endAll(nil)
	server, listener, err := f.server(door, serving)
	if err != nil {
		return err
	}
	slog.Info("serves", "address", listener.Addr().String(), "frontends", f.frontends)
	if err := f.tellReady(listener.Addr().String()); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- serve(server, listener) }()
	select {
	case err := <-ended:
		return err
	case <-stop:
	}
	return drain(f, server, door, endAll, stop)
}

func serve(server *http.Server, listener net.Listener) error {
	if server.TLSConfig != nil {
		return server.ServeTLS(listener, "", "")
	}
	return server.Serve(listener)
}

// drain ends in good order: health first, then no new connections, then what still runs.
func drain(
	f *flags, server *http.Server, door *front.Door, endAll context.CancelCauseFunc, again <-chan os.Signal,
) error {
	door.Drain()
	slog.Info("drains", "requests", door.Requests(), "streams", door.Streams())
	select {
	case <-time.After(f.drainDelay):
	case <-again:
	}
	left, cancel := context.WithTimeout(context.Background(), f.drain)
	defer cancel()
	go func() {
		select {
		case <-again:
			cancel()
		case <-left.Done():
		}
	}()
	if server.Shutdown(left) == nil {
		return nil
	}
	slog.Warn("ends what still runs", "requests", door.Requests(), "streams", door.Streams())
	endAll(&faults.Cause{Fault: faults.Draining})
	last, cancelLast := context.WithTimeout(context.Background(), farewell)
	defer cancelLast()
	if server.Shutdown(last) != nil {
		return server.Close()
	}
	return nil
}

// server listens, so that an address that is taken is known at once.
func (f *flags) server(door *front.Door, serving context.Context) (*http.Server, net.Listener, error) {
	config, err := f.serverTLS()
	if err != nil {
		return nil, nil, err
	}
	if err := f.checkOpen(); err != nil {
		return nil, nil, err
	}
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           door,
		TLSConfig:         config,
		Protocols:         protocols,
		ReadHeaderTimeout: f.headerTimeout,
		IdleTimeout:       f.idleTimeout,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return serving },
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	listener, err := net.Listen("tcp", f.listen)
	return server, listener, err
}

func (f *flags) serverTLS() (*tls.Config, error) {
	if f.tlsCert == "" {
		return nil, nil
	}
	return tlsfiles.Server(f.tlsCert, f.tlsKey, f.tlsClientCA)
}

func (f *flags) frontendTLS() (*tls.Config, error) {
	if f.frontendCA == "" {
		return nil, nil
	}
	return tlsfiles.Client(f.frontendCA, f.frontendCert, f.frontendKey)
}

// checkOpen refuses to be reached from other machines by whoever likes.
func (f *flags) checkOpen() error {
	if f.allowRemote || f.tlsClientCA != "" {
		return nil
	}
	host, _, err := net.SplitHostPort(f.listen)
	if err != nil {
		return err
	}
	found, err := net.DefaultResolver.LookupIPAddr(context.Background(), host)
	if host == "" || err != nil {
		found = []net.IPAddr{{IP: net.IPv4zero}}
	}
	for _, address := range found {
		if !address.IP.IsLoopback() {
			return fmt.Errorf("--listen %s can be reached from other machines, and nothing here authenticates "+
				"callers: use 127.0.0.1, ask clients for certificates (--tls-client-ca), or say "+
				"--allow-unauthenticated-remote on a network you trust", f.listen)
		}
	}
	return nil
}

// tellReady writes the address to whoever started this process and waits for it.
func (f *flags) tellReady(address string) error {
	if f.readyFD < 0 {
		return nil
	}
	pipe := os.NewFile(uintptr(f.readyFD), "ready")
	if pipe == nil {
		return errors.New("--ready-fd is no open file")
	}
	defer pipe.Close()
	return json.NewEncoder(pipe).Encode(map[string]string{"address": address})
}

func handler(format string) slog.Handler {
	if format == "json" {
		return slog.NewJSONHandler(os.Stderr, nil)
	}
	return slog.NewTextHandler(os.Stderr, nil)
}

type quiet struct{}

func (quiet) Write(p []byte) (int, error) { return len(p), nil }
