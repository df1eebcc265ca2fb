package front

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/protobuf/proto"

	"tandem/gateway/internal/faults"
	"tandem/gateway/internal/shape"
)

var pieces = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

// forwardStream sends server-sent events: a piece each, flushed at once, then [DONE]. An error before the
// first piece has its own HTTP status; a later one is the last event, and no [DONE] follows.
func forwardStream(
	ctx context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request,
	recv func() (proto.Message, error), _ ...func(context.Context, http.ResponseWriter, proto.Message) error,
) {
	out := w.(*recorder)
	usageNull := r.Body.(*shape.Body).UsageAsked
	buffer := pieces.Get().(*[]byte)
	defer func() { pieces.Put(buffer) }()
	event := (*buffer)[:0]
	for {
		piece, err := recv()
		event = append(event[:0], "data: "...)
		switch {
		case err == nil:
			event = shape.AppendChunk(event, piece, usageNull)
			out.pieces++
		case errors.Is(err, io.EOF):
			event = append(event, "[DONE]"...)
		case !out.touched:
			answer(out, faults.Of(ctx, err))
			return
		default:
			fault := faults.Of(ctx, err)
			out.reason, out.detail = fault.Code, fault.Detail
			event = append(event, fault.JSON()...)
		}
		event = append(event, '\n', '\n')
		if !out.touched {
			header := out.Header()
			header.Set("Content-Type", "text/event-stream")
			header.Set("Cache-Control", "no-cache")
			header.Set("X-Accel-Buffering", "no")
		}
		if _, failed := out.Write(event); failed != nil || out.flush() != nil || err != nil {
			*buffer = event
			return
		}
	}
}
