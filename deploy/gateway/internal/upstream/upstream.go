// Package upstream is the gateway's connection to the frontends.
package upstream

import (
	"crypto/tls"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // frontends that are not SERVING get nothing
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// Service is what frontends are asked for, and what their health is asked of.
const Service = "tandem.openai.v1.OpenAIService"

const roundRobin = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "` + Service + `"}
}`

const (
	mostAnswerBytes = 64 << 20
	// streamWindow is how much of an answer may wait here for a client that reads slowly.
	streamWindow = 64 << 10
	// connWindow is how much of all answers may be on its way.
	connWindow = 16 << 20
)

// Dial connects to the frontends, "host:port" of each. One name is looked up in DNS, and all of its
// addresses are used. `config` nil: without TLS.
func Dial(frontends []string, config *tls.Config) (*grpc.ClientConn, error) {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(roundRobin),
		grpc.WithDisableServiceConfig(), // what DNS says of it
		// Addresses are given, never found through a proxy of the environment.
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(mostAnswerBytes)),
		grpc.WithInitialWindowSize(streamWindow),
		grpc.WithInitialConnWindowSize(connWindow),
		grpc.WithUserAgent("tandem-gateway"),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time:                10 * time.Second,
			Timeout:             5 * time.Second,
			PermitWithoutStream: true,
		}),
		// A frontend that was restarted is found again soon.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
	if config != nil {
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	}
	if len(frontends) == 1 {
		return grpc.NewClient("dns:///"+frontends[0], options...)
	}
	list := manual.NewBuilderWithScheme("frontends")
	list.InitialState(resolver.State{Addresses: addresses(frontends)})
	return grpc.NewClient("frontends:///"+strings.Join(frontends, ","), append(options, grpc.WithResolvers(list))...)
}

func addresses(frontends []string) []resolver.Address {
	found := make([]resolver.Address, len(frontends))
	for i, frontend := range frontends {
		host, _, err := net.SplitHostPort(frontend)
		if err != nil {
			host = frontend
		}
		// The name that its certificate is held to.
		found[i] = resolver.Address{Addr: frontend, ServerName: host}
	}
	return found
}
