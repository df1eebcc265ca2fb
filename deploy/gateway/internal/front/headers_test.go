package front

import (
	"net/http"
	"testing"
	"time"
)

func header(pairs ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h.Add(pairs[i], pairs[i+1])
	}
	return h
}

func TestTimeouts(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"2.5": 2500 * time.Millisecond, "1e9": time.Hour, "3600": time.Hour, "1e-12": 1, "Inf": time.Hour,
	} {
		if got, fault := timeout(header("x-request-timeout", text), time.Hour); fault != nil || got != want {
			t.Errorf("%s: %v %v", text, got, fault)
		}
	}
	for text, want := range map[string]time.Duration{
		"2500m": 2500 * time.Millisecond, "10S": 10 * time.Second, "99999999H": time.Hour, "7u": 7 * time.Microsecond,
	} {
		if got, fault := timeout(header("grpc-timeout", text), time.Hour); fault != nil || got != want {
			t.Errorf("%s: %v %v", text, got, fault)
		}
	}
	if got, fault := timeout(http.Header{}, time.Hour); got != 0 || fault != nil {
		t.Error(got, fault)
	}
	for _, text := range []string{"0", "-1", "soon", "NaN", "-Inf"} {
		if _, fault := timeout(header("x-request-timeout", text), time.Hour); fault == nil || fault.Param != "x-request-timeout" {
			t.Errorf("%s: %v", text, fault)
		}
	}
	for _, text := range []string{"5", "5s", "S", "-1S", "123456789S", "0m"} {
		if _, fault := timeout(header("grpc-timeout", text), time.Hour); fault == nil || fault.Status != 400 {
			t.Errorf("%s: %v", text, fault)
		}
	}
}

func TestRequestIDs(t *testing.T) {
	if got := requestID(header("x-request-id", "a-b_c.d:9")); got != "a-b_c.d:9" {
		t.Error(got)
	}
	for _, bad := range []string{"", "a b", "é", "a#1", string(make([]byte, 129))} {
		if got := requestID(http.Header{"X-Request-Id": {bad}}); got == bad || !validID.MatchString(got) {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

func TestTakesGzip(t *testing.T) {
	for text, want := range map[string]bool{
		"gzip": true, "deflate, GZIP;q=0.5": true, "br": false, "gzip;q=0": false, "": false, "gzip; q=0.0": false, "xgzip": false,
	} {
		if got := takesGzip(header("accept-encoding", text)); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}
