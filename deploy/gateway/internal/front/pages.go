package front

import (
	"context"
	_ "embed"
	"net/http"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"tandem/gateway/internal/upstream"
)

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docs []byte

// healthPatience is how long frontends may take to say that they are well.
const healthPatience = 2 * time.Second

// page is something that is not of the API.
type page struct {
	kind string
	text []byte
}

func pages() map[string]page {
	return map[string]page{
		"/openapi.json": {"application/json", openAPI},
		"/docs":         {"text/html; charset=utf-8", docs},
	}
}

// page answers what is not of the API, and tells whether it was that.
func (d *Door) page(w *recorder, r *http.Request) bool {
	var show func()
	switch path := r.URL.Path; path {
	case "/healthz":
		show = func() { d.healthz(w) }
	case "/health":
		show = func() { d.health(w, r) }
	case "/metrics":
		show = func() {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			d.metrics.Write(w)
		}
	default:
		found, known := d.pages[path]
		if !known {
			return false
		}
		show = func() {
			w.pack = takesGzip(r.Header)
			header := w.Header()
			header.Add("Vary", "Accept-Encoding")
			header.Set("Content-Type", found.kind)
			header.Set("X-Content-Type-Options", "nosniff")
			// The page's own script and style, and calls to where it came from: nothing else.
			header.Set("Content-Security-Policy",
				"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'")
			_, _ = w.Write(found.text)
		}
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		answer(w, notAllowed(r))
		return true
	}
	show()
	return true
}

// healthz tells whether this process takes requests.
func (d *Door) healthz(w *recorder) {
	if d.draining.Load() {
		tell(w, http.StatusServiceUnavailable, "draining")
		return
	}
	tell(w, http.StatusOK, "ok")
}

// health tells whether a frontend serves, too.
func (d *Door) health(w *recorder, r *http.Request) {
	if d.draining.Load() {
		tell(w, http.StatusServiceUnavailable, "draining")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), healthPatience)
	defer cancel()
	told, err := grpc_health_v1.NewHealthClient(d.conn).Check(
		ctx, &grpc_health_v1.HealthCheckRequest{Service: upstream.Service})
	if err != nil || told.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		tell(w, http.StatusServiceUnavailable, "no frontend serves")
		return
	}
	tell(w, http.StatusOK, "ok")
}

func tell(w *recorder, status int, words string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(`{"status":"` + words + `"}` + "\n"))
}
