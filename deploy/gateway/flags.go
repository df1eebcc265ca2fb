package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"tandem/gateway/internal/front"
)

// flags are what the process is told; see `tandem-gateway --help`.
type flags struct {
	listen      string
	frontends   []string
	allowRemote bool

	maxBody       int64
	maxRequests   int64
	maxStreams    int64
	headerTimeout time.Duration
	bodyTimeout   time.Duration
	stallTimeout  time.Duration
	idleTimeout   time.Duration
	maxTimeout    time.Duration
	drain         time.Duration
	drainDelay    time.Duration

	tenantHeader string
	origins      []string
	logFormat    string
	accessLog    bool
	readyFD      int

	tlsCert, tlsKey, tlsClientCA          string
	frontendCA, frontendCert, frontendKey string
}

// parse says on `out` what is wrong, and what can be said.
func parse(arguments []string, out io.Writer) (*flags, error) {
	f := &flags{}
	set := flag.NewFlagSet("tandem-gateway", flag.ContinueOnError)
	set.SetOutput(out)
	var frontends, origins string
	set.StringVar(&f.listen, "listen", "127.0.0.1:7480", "`host:port` to serve on; port 0 takes a free one")
	set.StringVar(&frontends, "frontends", "127.0.0.1:7400",
		"`host:port` of each frontend, with commas; a single name may have many addresses in DNS")
	set.BoolVar(&f.allowRemote, "allow-unauthenticated-remote", false,
		"listen beyond loopback although nothing here authenticates callers")
	set.Int64Var(&f.maxBody, "max-body-bytes", 4<<20, "largest body, unpacked; frontends have a limit of their own")
	set.Int64Var(&f.maxRequests, "max-requests", 4096, "requests served at once, streams among them; 0: any number")
	set.Int64Var(&f.maxStreams, "max-streams", 0, "streams served at once; 0: any number")
	set.DurationVar(&f.headerTimeout, "header-timeout", 10*time.Second, "how long a request's header may take")
	set.DurationVar(&f.bodyTimeout, "body-timeout", 30*time.Second, "how long a request's body may take")
	set.DurationVar(&f.stallTimeout, "stall-timeout", time.Minute, "how long a client may take nothing of its answer")
	set.DurationVar(&f.idleTimeout, "idle-timeout", 2*time.Minute, "how long a connection may be idle")
	set.DurationVar(&f.maxTimeout, "max-timeout", time.Hour, "longest deadline a client can ask for (x-request-timeout)")
	set.DurationVar(&f.drain, "drain", 20*time.Second, "how long what runs may go on after SIGTERM")
	set.DurationVar(&f.drainDelay, "drain-delay", 0,
		"how long to take connections after SIGTERM, while /healthz says 503: for load balancers to see it")
	set.StringVar(&f.tenantHeader, "tenant-header", "",
		"`name` of a header passed on to the frontends, whose frontend.tenant_metadata it is; only behind a proxy that sets it")
	set.StringVar(&origins, "cors-origins", "", "origins whose pages may call, with commas; *: all")
	set.StringVar(&f.logFormat, "log", "text", "text or json")
	set.BoolVar(&f.accessLog, "access-log", true, "log a line a request")
	set.IntVar(&f.readyFD, "ready-fd", -1, "file descriptor that the address is written to when it serves")
	set.StringVar(&f.tlsCert, "tls-cert", "", "certificate shown to clients, PEM `file`; read again when it changes")
	set.StringVar(&f.tlsKey, "tls-key", "", "its key, PEM `file`")
	set.StringVar(&f.tlsClientCA, "tls-client-ca", "", "clients need a certificate of these authorities, PEM `file`")
	set.StringVar(&f.frontendCA, "frontend-ca", "", "frontends speak TLS, with a certificate of these authorities, PEM `file`")
	set.StringVar(&f.frontendCert, "frontend-cert", "", "certificate shown to frontends, PEM `file`")
	set.StringVar(&f.frontendKey, "frontend-key", "", "its key, PEM `file`")
	if err := set.Parse(arguments); err != nil {
		return nil, err
	}
	f.frontends, f.origins = list(frontends), list(origins)
	if err := f.check(set.Args()); err != nil {
		fmt.Fprintln(out, "tandem-gateway:", err)
		return nil, err
	}
	return f, nil
}

func list(text string) []string {
	var found []string
	for _, one := range strings.Split(text, ",") {
		if one = strings.TrimSpace(one); one != "" {
			found = append(found, one)
		}
	}
	return found
}

func (f *flags) check(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("%q is no flag", rest[0])
	case len(f.frontends) == 0:
		return errors.New("--frontends names none")
	case f.logFormat != "text" && f.logFormat != "json":
		return fmt.Errorf("--log %s: text or json", f.logFormat)
	case (f.tlsCert == "") != (f.tlsKey == ""):
		return errors.New("--tls-cert and --tls-key need each other")
	case f.tlsClientCA != "" && f.tlsCert == "":
		return errors.New("--tls-client-ca needs --tls-cert")
	case (f.frontendCert == "") != (f.frontendKey == ""):
		return errors.New("--frontend-cert and --frontend-key need each other")
	case f.frontendCert != "" && f.frontendCA == "":
		return errors.New("--frontend-cert needs --frontend-ca")
	case f.maxBody < 1, f.maxRequests < 0, f.maxStreams < 0:
		return errors.New("a limit can't be negative, nor --max-body-bytes 0")
	}
	for name, value := range map[string]time.Duration{
		"header-timeout": f.headerTimeout, "body-timeout": f.bodyTimeout, "stall-timeout": f.stallTimeout,
		"idle-timeout": f.idleTimeout, "max-timeout": f.maxTimeout,
	} {
		if value <= 0 {
			return fmt.Errorf("--%s %s: above 0", name, value)
		}
	}
	return nil
}

func (f *flags) options() front.Options {
	options := front.Options{
		MaxBodyBytes: f.maxBody,
		BodyTimeout:  f.bodyTimeout,
		StallTimeout: f.stallTimeout,
		MaxTimeout:   f.maxTimeout,
		MaxRequests:  f.maxRequests,
		MaxStreams:   f.maxStreams,
		TenantHeader: f.tenantHeader,
		Origins:      f.origins,
	}
	if f.accessLog {
		options.AccessLog = slog.Default()
	}
	return options
}
