package front

import (
	"compress/gzip"
	"net/http"
	"sync"
	"time"
)

// gzipFrom is the size of an answer from which packing it is worth its time.
const gzipFrom = 1400

var packers = sync.Pool{New: func() any {
	w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return w
}}

// recorder is a ResponseWriter that knows what was sent, gives up on clients that take nothing, and
// packs answers that are written at once.
type recorder struct {
	http.ResponseWriter
	control *http.ResponseController
	// stall is how long a write may wait for the client.
	stall time.Duration
	// pack: the client takes gzip.
	pack    bool
	status  int
	bytes   int64
	first   time.Time
	pieces  int
	stream  bool
	reason  string // of a fault: its code
	detail  string // of a fault: what the client was not told
	touched bool   // the answer has begun
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) WriteHeader(status int) {
	if r.touched {
		return
	}
	r.touched = true
	r.status = status
	r.first = time.Now()
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(data []byte) (int, error) {
	// On a writer that knows no deadline a client that takes nothing is the server's to notice.
	_ = r.control.SetWriteDeadline(time.Now().Add(r.stall))
	if !r.touched && r.pack && len(data) >= gzipFrom {
		return r.packed(data)
	}
	r.WriteHeader(http.StatusOK)
	n, err := r.ResponseWriter.Write(data)
	r.bytes += int64(n)
	return n, err
}

// packed writes an answer that comes in one piece.
func (r *recorder) packed(data []byte) (int, error) {
	header := r.Header()
	header.Del("Content-Length")
	header.Set("Content-Encoding", "gzip")
	r.WriteHeader(http.StatusOK)
	packer := packers.Get().(*gzip.Writer)
	defer packers.Put(packer)
	packer.Reset(countingWriter{r})
	if _, err := packer.Write(data); err != nil {
		return 0, err
	}
	return len(data), packer.Close()
}

type countingWriter struct{ r *recorder }

func (w countingWriter) Write(data []byte) (int, error) {
	n, err := w.r.ResponseWriter.Write(data)
	w.r.bytes += int64(n)
	return n, err
}

func (r *recorder) flush() error { return r.control.Flush() }
