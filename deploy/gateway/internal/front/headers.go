package front

import (
	"crypto/rand"
	"encoding/hex"
	"math"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"tandem/gateway/internal/faults"
)

const (
	requestIDHeader = "X-Request-Id"
	timeoutHeader   = "X-Request-Timeout"
	grpcTimeout     = "Grpc-Timeout"
)

// validID is what a frontend takes for the id of a request.
var validID = regexp.MustCompile(`^[A-Za-z0-9\-_.:]{1,128}$`)

// requestID is the client's id where it can be one, and a new one otherwise.
func requestID(header http.Header) string {
	if id := header.Get(requestIDHeader); validID.MatchString(id) {
		return id
	}
	var random [12]byte
	_, _ = rand.Read(random[:]) // does not fail on any system since Go 1.24
	return hex.EncodeToString(random[:])
}

// passed are the headers that go on to the frontends, by their canonical names, besides Authorization,
// which grpc-gateway passes by itself.
func passed(tenantHeader string) map[string]string {
	names := []string{requestIDHeader, "Traceparent", "Tracestate"}
	if tenantHeader != "" {
		names = append(names, tenantHeader)
	}
	found := map[string]string{}
	for _, name := range names {
		found[http.CanonicalHeaderKey(name)] = strings.ToLower(name)
	}
	return found
}

// grpcUnits are those of Grpc-Timeout.
var grpcUnits = map[byte]time.Duration{
	'H': time.Hour, 'M': time.Minute, 'S': time.Second,
	'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
}

// timeout is what the client allows for the request, at most `most`; 0: it says nothing.
func timeout(header http.Header, most time.Duration) (time.Duration, *faults.Fault) {
	seconds, form := 0.0, ""
	if text := header.Get(timeoutHeader); text != "" {
		number, err := strconv.ParseFloat(text, 64)
		seconds, form = number, text
		if err != nil || math.IsNaN(number) || number <= 0 {
			return 0, badTimeout("x-request-timeout", text, "seconds, such as 2.5")
		}
	} else if text := header.Get(grpcTimeout); text != "" {
		unit, known := grpcUnits[text[len(text)-1]]
		number, err := strconv.ParseUint(text[:len(text)-1], 10, 32)
		seconds, form = float64(number)*unit.Seconds(), text
		if err != nil || !known || number == 0 || len(text) > 9 {
			return 0, badTimeout("grpc-timeout", text, "digits and a unit, such as 2500m")
		}
	}
	switch {
	case form == "":
		return 0, nil
	case seconds >= most.Seconds():
		return most, nil
	}
	return max(time.Duration(seconds*float64(time.Second)), 1), nil
}

func badTimeout(name, text, expected string) *faults.Fault {
	if len(text) > 40 {
		text = text[:37] + "..."
	}
	fault := faults.Invalid(400, "invalid_value", name,
		"Invalid header '"+name+"': expected "+expected+", but got "+strconv.Quote(text)+".")
	return &fault
}

// takesGzip tells whether an answer may be packed.
func takesGzip(header http.Header) bool {
	for _, line := range header.Values("Accept-Encoding") {
		for _, one := range strings.Split(line, ",") {
			name, weight, _ := strings.Cut(strings.TrimSpace(one), ";")
			if !strings.EqualFold(strings.TrimSpace(name), "gzip") {
				continue
			}
			q, err := strconv.ParseFloat(strings.TrimPrefix(strings.ReplaceAll(weight, " ", ""), "q="), 64)
			return weight == "" || err != nil || q > 0
		}
	}
	return false
}

// cors says which pages of other origins may call.
type cors struct {
	any     bool
	origins map[string]bool
}

func newCORS(origins []string) cors {
	c := cors{origins: map[string]bool{}}
	for _, origin := range origins {
		c.any = c.any || origin == "*"
		c.origins[origin] = true
	}
	return c
}

// answer adds what a browser asks for, and tells whether the request was only that question.
func (c cors) answer(w http.ResponseWriter, r *http.Request) bool {
	if !c.any && len(c.origins) == 0 {
		return false
	}
	header := w.Header()
	header.Add("Vary", "Origin")
	origin := r.Header.Get("Origin")
	if origin == "" || !c.any && !c.origins[origin] {
		return false
	}
	if c.any {
		origin = "*"
	}
	header.Set("Access-Control-Allow-Origin", origin)
	header.Set("Access-Control-Expose-Headers", "x-request-id, retry-after, retry-after-ms")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	header.Set("Access-Control-Allow-Methods", "GET, POST")
	if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
		header.Set("Access-Control-Allow-Headers", asked)
		header.Add("Vary", "Access-Control-Request-Headers")
	}
	header.Set("Access-Control-Max-Age", "86400")
	w.WriteHeader(http.StatusNoContent)
	return true
}
