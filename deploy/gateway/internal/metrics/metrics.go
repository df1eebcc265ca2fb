// Package metrics counts what the gateway does, and tells it in Prometheus' text format.
package metrics

import (
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

var secondsBounds = []float64{
	.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
}

const statuses = 600

// Route counts the requests of one path. Fields may be used by many at once.
type Route struct {
	path       string
	inFlight   atomic.Int64
	byStatus   [statuses]atomic.Uint64
	seconds    histogram
	firstByte  histogram
	bytesIn    atomic.Uint64
	bytesOut   atomic.Uint64
	streams    atomic.Int64
	allStreams atomic.Uint64
	pieces     atomic.Uint64
}

// Begin counts a request that came.
func (r *Route) Begin() { r.inFlight.Add(1) }

// End counts a request's end. firstByte is 0 if nothing was sent.
func (r *Route) End(status int, seconds, firstByte time.Duration, in, out int64) {
	r.inFlight.Add(-1)
	if status < 0 || status >= statuses {
		status = 0
	}
	r.byStatus[status].Add(1)
	r.seconds.observe(seconds)
	if firstByte > 0 {
		r.firstByte.observe(firstByte)
	}
	r.bytesIn.Add(uint64(in))
	r.bytesOut.Add(uint64(out))
}

// StreamBegins and StreamEnds count streams; pieces are what was sent of one.
func (r *Route) StreamBegins() { r.streams.Add(1); r.allStreams.Add(1) }

// StreamEnds is the other end of StreamBegins.
func (r *Route) StreamEnds(pieces int) { r.streams.Add(-1); r.pieces.Add(uint64(pieces)) }

type histogram struct {
	counts []atomic.Uint64 // one more than bounds
	sum    atomic.Uint64   // bits of a float64
}

func (h *histogram) observe(d time.Duration) {
	seconds := d.Seconds()
	i := 0
	for i < len(secondsBounds) && seconds > secondsBounds[i] {
		i++
	}
	h.counts[i].Add(1)
	for {
		old := h.sum.Load()
		if h.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+seconds)) {
			return
		}
	}
}

// All are the metrics of the process.
type All struct {
	routes []*Route
	start  time.Time
	// Refused are requests turned away by a limit of the gateway.
	Refused atomic.Uint64
	// Draining is 1 while the process ends.
	Draining atomic.Int64
}

// New has metrics for these paths; what is asked for beyond them counts as "other", the last one.
func New(paths []string) *All {
	all := &All{start: time.Now()}
	for _, path := range append(paths, "other") {
		route := &Route{path: path}
		route.seconds.counts = make([]atomic.Uint64, len(secondsBounds)+1)
		route.firstByte.counts = make([]atomic.Uint64, len(secondsBounds)+1)
		all.routes = append(all.routes, route)
	}
	return all
}

// Route is the one of a path.
func (a *All) Route(path string) *Route {
	for _, route := range a.routes {
		if route.path == path {
			return route
		}
	}
	return a.routes[len(a.routes)-1]
}

// InFlight is how many requests and streams are being answered.
func (a *All) InFlight() (requests, streams int64) {
	for _, route := range a.routes {
		requests += route.inFlight.Load()
		streams += route.streams.Load()
	}
	return requests, streams
}

// Write tells all.
func (a *All) Write(w io.Writer) {
	var b strings.Builder
	family := func(name, kind, help string) {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	each := func(name, kind, help string, value func(*Route) any) {
		family(name, kind, help)
		for _, r := range a.routes {
			fmt.Fprintf(&b, "%s{path=%q} %v\n", name, r.path, value(r))
		}
	}
	family("tandem_gateway_requests_total", "counter", "Requests answered, by HTTP status.")
	for _, r := range a.routes {
		for status := range r.byStatus {
			if n := r.byStatus[status].Load(); n > 0 {
				fmt.Fprintf(&b, "tandem_gateway_requests_total{path=%q,status=\"%d\"} %d\n", r.path, status, n)
			}
		}
	}
	each("tandem_gateway_requests_in_flight", "gauge", "Requests being answered.",
		func(r *Route) any { return r.inFlight.Load() })
	each("tandem_gateway_streams_in_flight", "gauge", "Streams being sent.",
		func(r *Route) any { return r.streams.Load() })
	each("tandem_gateway_streams_total", "counter", "Streams begun.",
		func(r *Route) any { return r.allStreams.Load() })
	each("tandem_gateway_stream_pieces_total", "counter", "Pieces of streams sent.",
		func(r *Route) any { return r.pieces.Load() })
	each("tandem_gateway_received_bytes_total", "counter", "Bytes of bodies received, as sent.",
		func(r *Route) any { return r.bytesIn.Load() })
	each("tandem_gateway_sent_bytes_total", "counter", "Bytes of bodies sent.",
		func(r *Route) any { return r.bytesOut.Load() })
	a.histograms(&b, family)
	family("tandem_gateway_refused_total", "counter", "Requests refused by a limit of the gateway.")
	fmt.Fprintf(&b, "tandem_gateway_refused_total %d\n", a.Refused.Load())
	family("tandem_gateway_draining", "gauge", "1 while the gateway shuts down.")
	fmt.Fprintf(&b, "tandem_gateway_draining %d\n", a.Draining.Load())
	a.process(&b, family)
	_, _ = io.WriteString(w, b.String())
}

func (a *All) histograms(b *strings.Builder, family func(name, kind, help string)) {
	for _, one := range []struct {
		name, help string
		of         func(*Route) *histogram
	}{
		{"tandem_gateway_request_seconds", "From a request's header to its answer's end.",
			func(r *Route) *histogram { return &r.seconds }},
		{"tandem_gateway_first_byte_seconds", "From a request's header to the first byte of its answer.",
			func(r *Route) *histogram { return &r.firstByte }},
	} {
		family(one.name, "histogram", one.help)
		for _, r := range a.routes {
			h := one.of(r)
			sum := uint64(0)
			for i := range h.counts {
				sum += h.counts[i].Load()
				le := "+Inf"
				if i < len(secondsBounds) {
					le = strconv.FormatFloat(secondsBounds[i], 'g', -1, 64)
				}
				fmt.Fprintf(b, "%s_bucket{path=%q,le=%q} %d\n", one.name, r.path, le, sum)
			}
			fmt.Fprintf(b, "%s_sum{path=%q} %g\n", one.name, r.path, math.Float64frombits(h.sum.Load()))
			fmt.Fprintf(b, "%s_count{path=%q} %d\n", one.name, r.path, sum)
		}
	}
}

// process tells of the process under the names that Prometheus' own clients use.
func (a *All) process(b *strings.Builder, family func(name, kind, help string)) {
	family("process_start_time_seconds", "gauge", "Unix time of the start.")
	fmt.Fprintf(b, "process_start_time_seconds %d\n", a.start.Unix())
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
		cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
		family("process_cpu_seconds_total", "counter", "CPU time, user and system.")
		fmt.Fprintf(b, "process_cpu_seconds_total %g\n", cpu.Seconds())
	}
	if resident, ok := residentBytes(); ok {
		family("process_resident_memory_bytes", "gauge", "Resident memory.")
		fmt.Fprintf(b, "process_resident_memory_bytes %d\n", resident)
	}
	family("go_goroutines", "gauge", "Goroutines.")
	fmt.Fprintf(b, "go_goroutines %d\n", runtime.NumGoroutine())
}

func residentBytes() (int, bool) {
	text, err := os.ReadFile("/proc/self/statm") // Linux only
	if err != nil {
		return 0, false
	}
	fields := strings.Fields(string(text))
	if len(fields) < 2 {
		return 0, false
	}
	pages, err := strconv.Atoi(fields[1])
	return pages * os.Getpagesize(), err == nil
}
