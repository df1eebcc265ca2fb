// Package front is the HTTP side of the gateway: which path is what, limits, headers, and the way
// through grpc-gateway's generated handlers.
package front

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"

	"tandem/gateway/gen/openai"
	"tandem/gateway/internal/faults"
	"tandem/gateway/internal/metrics"
	"tandem/gateway/internal/shape"
)

// Options are how the gateway serves.
type Options struct {
	// MaxBodyBytes is the largest body, unpacked.
	MaxBodyBytes int64
	// BodyTimeout is how long a body may take to come.
	BodyTimeout time.Duration
	// StallTimeout is how long a client may take nothing of its answer.
	StallTimeout time.Duration
	// MaxTimeout bounds what clients allow for a request.
	MaxTimeout time.Duration
	// MaxRequests and MaxStreams are served at once; 0: any number.
	MaxRequests, MaxStreams int64
	// TenantHeader is passed on; empty: none is.
	TenantHeader string
	// Origins may call from browsers; "*": all.
	Origins []string
	// AccessLog gets a line a request; nil: none.
	AccessLog *slog.Logger
}

// route is a path of the API.
type route struct {
	method string
	// streamed is where grpc-gateway has the streaming rpc; empty: there is none.
	streamed string
	count    *metrics.Route
}

// Door serves HTTP.
type Door struct {
	options  Options
	api      *runtime.ServeMux
	routes   map[string]route
	models   route
	other    *metrics.Route
	metrics  *metrics.All
	pages    map[string]page
	cors     cors
	conn     *grpc.ClientConn
	draining atomic.Bool
	requests atomic.Int64
	streams  atomic.Int64
}

const modelsPath = "/v1/models"

// New serves the API of the frontends behind `conn`.
func New(conn *grpc.ClientConn, options Options) (*Door, error) {
	openai.ForwardStreamsBy(forwardStream)
	d := &Door{options: options, conn: conn, cors: newCORS(options.Origins), pages: pages()}
	d.metrics = metrics.New([]string{
		"/v1/chat/completions", "/v1/completions", modelsPath, modelsPath + "/{model}",
		"/v1/tokenize", "/v1/detokenize",
	})
	d.other = d.metrics.Route("other")
	post := func(path, streamed string) route {
		return route{http.MethodPost, streamed, d.metrics.Route(path)}
	}
	d.routes = map[string]route{
		"/v1/chat/completions": post("/v1/chat/completions", "/v1/chat/completions:stream"),
		"/v1/completions":      post("/v1/completions", "/v1/completions:stream"),
		"/v1/tokenize":         post("/v1/tokenize", ""),
		"/v1/detokenize":       post("/v1/detokenize", ""),
		"/tokenize":            post("/v1/tokenize", ""),
		"/detokenize":          post("/v1/detokenize", ""),
		modelsPath:             {http.MethodGet, "", d.metrics.Route(modelsPath)},
	}
	d.models = route{http.MethodGet, "", d.metrics.Route(modelsPath + "/{model}")}
	names := passed(options.TenantHeader)
	d.api = runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, shape.Marshaler{}),
		runtime.WithDisablePathLengthFallback(),
		runtime.WithUnescapingMode(runtime.UnescapingModeAllCharacters),
		runtime.WithIncomingHeaderMatcher(func(name string) (string, bool) {
			passedAs, ok := names[name]
			return passedAs, ok
		}),
		runtime.WithOutgoingHeaderMatcher(func(name string) (string, bool) {
			return name, strings.HasPrefix(name, "x-ratelimit-")
		}),
		runtime.WithOutgoingTrailerMatcher(func(string) (string, bool) { return "", false }),
		runtime.WithErrorHandler(d.failed),
		runtime.WithRoutingErrorHandler(d.unrouted),
	)
	err := openai.RegisterOpenAIServiceHandlerClient(context.Background(), d.api, openai.NewOpenAIServiceClient(conn))
	return d, err
}

// Drain has /healthz say that no more requests should come.
func (d *Door) Drain() {
	d.draining.Store(true)
	d.metrics.Draining.Store(1)
}

// Streams is how many streams are being sent, and Requests how many requests are being answered.
func (d *Door) Streams() int64 { return d.streams.Load() }

// Requests is how many requests are being answered.
func (d *Door) Requests() int64 { return d.requests.Load() }

// ServeHTTP answers one request, counts it and writes its line.
func (d *Door) ServeHTTP(plain http.ResponseWriter, r *http.Request) {
	start := time.Now()
	w := &recorder{
		ResponseWriter: plain,
		control:        http.NewResponseController(plain),
		stall:          d.options.StallTimeout,
	}
	id := requestID(r.Header)
	w.Header().Set(requestIDHeader, id)
	seen := seen{start: start, id: id, method: r.Method, path: r.URL.Path, remote: r.RemoteAddr, count: d.other}
	defer func() {
		if bug := recover(); bug != nil {
			slog.Error("a bug", "request_id", id, "panic", fmt.Sprint(bug), "stack", string(debug.Stack()))
			if w.touched {
				d.over(w, &seen)
				panic(http.ErrAbortHandler)
			}
			answer(w, faults.Bug)
		}
		d.over(w, &seen)
	}()
	if d.cors.answer(w, r) || d.page(w, r) {
		return
	}
	found, known := d.routes[r.URL.Path]
	if name, under := strings.CutPrefix(r.URL.Path, modelsPath+"/"); under && name != "" {
		found, known = d.models, true
	}
	switch {
	case !known:
		answer(w, unknownURL(r))
	case r.Method != found.method:
		w.Header().Set("Allow", found.method)
		answer(w, notAllowed(r))
	default:
		seen.counted = true
		seen.count = found.count
		seen.count.Begin()
		d.call(w, r, found, &seen)
	}
}

// call is one request to the API.
func (d *Door) call(w *recorder, r *http.Request, to route, seen *seen) {
	defer d.requests.Add(-1)
	if now := d.requests.Add(1); d.options.MaxRequests > 0 && now > d.options.MaxRequests {
		d.refuse(w, faults.TooManyRequests)
		return
	}
	limit, fault := timeout(r.Header, d.options.MaxTimeout)
	if fault != nil {
		answer(w, *fault)
		return
	}
	body := &shape.Body{}
	if to.method == http.MethodPost {
		got, fault := readBody(w, r, d.options.MaxBodyBytes, d.options.BodyTimeout)
		seen.in = got.bytes
		if fault != nil {
			answer(w, *fault)
			return
		}
		body.Data = got.text
	}
	if to.streamed != "" && shape.Streamed(body.Data) {
		defer d.streams.Add(-1)
		if now := d.streams.Add(1); d.options.MaxStreams > 0 && now > d.options.MaxStreams {
			d.refuse(w, faults.TooManyStreams)
			return
		}
		to.count.StreamBegins()
		defer func() { to.count.StreamEnds(w.pieces) }()
		w.stream = true
		r.URL.Path, r.URL.RawPath = to.streamed, ""
	} else {
		w.Header().Add("Vary", "Accept-Encoding")
		w.pack = takesGzip(r.Header)
	}
	if limit > 0 {
		ctx, cancel := context.WithTimeout(r.Context(), limit)
		defer cancel()
		r = r.WithContext(ctx)
	}
	r.Body = body
	r.Header.Set(requestIDHeader, seen.id)
	r.Header.Del(grpcTimeout) // it was read here, and is bounded
	r.Header.Del("Te")        // no trailers
	d.api.ServeHTTP(w, r)
}

func (d *Door) refuse(w *recorder, fault faults.Fault) {
	d.metrics.Refused.Add(1)
	answer(w, fault)
}

// answer writes a fault, and keeps for the log what it was.
func answer(w *recorder, fault faults.Fault) {
	w.reason, w.detail = fault.Code, fault.Detail
	w.pack = false
	fault.Write(w)
}

// failed is grpc-gateway's way to answer with an error.
func (d *Door) failed(
	ctx context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error,
) {
	if body, ok := r.Body.(*shape.Body); ok && body.Err != nil {
		err = body.Err // grpc-gateway made a status of it, and lost which field it was
	}
	answer(w.(*recorder), faults.Of(ctx, err))
}

// unrouted is for paths that grpc-gateway does not know, though this package does.
func (d *Door) unrouted(
	_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, _ int,
) {
	answer(w.(*recorder), unknownURL(r))
}

func unknownURL(r *http.Request) faults.Fault {
	return faults.Invalid(http.StatusNotFound, "unknown_url", "",
		fmt.Sprintf("Unknown request URL: %s %s. Please check the URL for typos, or see /docs.", r.Method, cut(r.URL.Path)))
}

func notAllowed(r *http.Request) faults.Fault {
	return faults.Invalid(http.StatusMethodNotAllowed, "method_not_supported", "",
		fmt.Sprintf("Not allowed to %s on %s.", r.Method, cut(r.URL.Path)))
}

// seen is what is counted and logged of a request.
type seen struct {
	start                    time.Time
	id, method, path, remote string
	in                       int64
	count                    *metrics.Route
	counted                  bool
}

func (d *Door) over(w *recorder, s *seen) {
	took := time.Since(s.start)
	firstByte := time.Duration(0)
	if !w.first.IsZero() {
		firstByte = w.first.Sub(s.start)
	}
	if !s.counted {
		s.count.Begin()
	}
	s.count.End(w.status, took, firstByte, s.in, w.bytes)
	if d.options.AccessLog == nil {
		return
	}
	fields := []slog.Attr{
		slog.String("request_id", s.id), slog.String("remote", s.remote),
		slog.String("method", s.method), slog.String("path", s.path),
		slog.Int("status", w.status), slog.Int64("bytes_in", s.in), slog.Int64("bytes_out", w.bytes),
		slog.Float64("ms", float64(took.Microseconds())/1e3),
	}
	if w.stream {
		fields = append(fields, slog.Float64("first_byte_ms", float64(firstByte.Microseconds())/1e3),
			slog.Int("pieces", w.pieces))
	}
	if w.reason != "" {
		fields = append(fields, slog.String("error", w.reason))
	}
	if w.detail != "" {
		fields = append(fields, slog.String("detail", w.detail))
	}
	d.options.AccessLog.LogAttrs(context.Background(), slog.LevelInfo, "request", fields...)
}
