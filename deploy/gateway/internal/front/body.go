package front

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"time"

	"tandem/gateway/internal/faults"
)

// received is a body, and how many bytes came over the wire for it.
type received struct {
	text  []byte
	bytes int64
}

// readBody reads a JSON body of at most `most` bytes, unpacked, within `patience`.
func readBody(w *recorder, r *http.Request, most int64, patience time.Duration) (received, *faults.Fault) {
	if fault := checkKind(r.Header); fault != nil {
		return received{}, fault
	}
	if r.ContentLength > most {
		return received{}, tooLarge(most)
	}
	deadline := time.Now().Add(patience)
	_ = w.control.SetReadDeadline(deadline) // a connection without deadlines has none to keep
	wire := &counted{r: http.MaxBytesReader(w, r.Body, most)}
	text, err := readAll(wire, r, most)
	if err == nil {
		// From here on, reading is only how the client's leaving is noticed.
		_ = w.control.SetReadDeadline(time.Time{})
		return received{text, wire.n}, nil
	}
	fault := whyUnread(err, most)
	if fault.Status == http.StatusRequestTimeout || fault.Status == http.StatusRequestEntityTooLarge {
		// The rest of the body is not waited for.
		w.Header().Set("Connection", "close")
	}
	return received{nil, wire.n}, &fault
}

// counted counts the bytes read, and knows whether the body came to its end.
type counted struct {
	r     io.Reader
	n     int64
	whole bool
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.whole = c.whole || err == io.EOF
	return n, err
}

var errTooLarge = errors.New("larger when unpacked")

type badPacking struct{ error }

func readAll(wire *counted, r *http.Request, most int64) ([]byte, error) {
	var text bytes.Buffer
	if r.Header.Get("Content-Encoding") != "gzip" {
		if r.ContentLength > 0 {
			text.Grow(int(min(r.ContentLength, 1<<20)) + bytes.MinRead)
		}
		_, err := text.ReadFrom(wire)
		return text.Bytes(), err
	}
	unpacker, err := gzip.NewReader(wire)
	if err != nil {
		return nil, packingOr(err, wire)
	}
	n, err := text.ReadFrom(io.LimitReader(unpacker, most+1))
	if err != nil {
		return nil, packingOr(err, wire)
	}
	if n > most {
		return nil, errTooLarge
	}
	// To the body's end, so that the connection's next byte is the client's leaving.
	_, err = io.Copy(io.Discard, wire)
	return text.Bytes(), err
}

// packingOr tells what is wrong with the packing from what is wrong with the connection.
func packingOr(err error, wire *counted) error {
	if wire.whole || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) {
		return badPacking{err}
	}
	return err
}

func whyUnread(err error, most int64) faults.Fault {
	var large *http.MaxBytesError
	var network net.Error
	var packing badPacking
	switch {
	case errors.As(err, &large), errors.Is(err, errTooLarge):
		return *tooLarge(most)
	case errors.As(err, &packing):
		return faults.Invalid(400, "invalid_encoding", "",
			"The request's body is not the gzip that its Content-Encoding says: "+packing.Error()+".")
	case errors.As(err, &network) && network.Timeout():
		return faults.SlowBody
	default:
		return faults.Gone
	}
}

func tooLarge(most int64) *faults.Fault {
	fault := faults.Invalid(http.StatusRequestEntityTooLarge, "request_too_large", "",
		fmt.Sprintf("The request's body is larger than %d bytes.", most))
	return &fault
}

func checkKind(header http.Header) *faults.Fault {
	if kind := header.Get("Content-Type"); kind != "" {
		if media, _, err := mime.ParseMediaType(kind); err != nil || media != "application/json" {
			fault := faults.Invalid(http.StatusUnsupportedMediaType, "unsupported_media_type", "",
				fmt.Sprintf("The request's Content-Type must be application/json, not %q.", cut(kind)))
			return &fault
		}
	}
	switch packing := header.Get("Content-Encoding"); packing {
	case "", "identity", "gzip":
		return nil
	default:
		fault := faults.Invalid(http.StatusUnsupportedMediaType, "unsupported_encoding", "",
			fmt.Sprintf("The request's Content-Encoding must be gzip or none, not %q.", cut(packing)))
		return &fault
	}
}

func cut(text string) string {
	if len(text) > 60 {
		return text[:57] + "..."
	}
	return text
}
