package openai

// Written by hand, beside what is generated: grpc-gateway keeps how it answers in variables that
// only this package can set.

import (
	"context"
	"net/http"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/protobuf/proto"
)

// StreamForwarder passes a stream on to an HTTP client, as runtime.ForwardResponseStream does.
type StreamForwarder func(
	ctx context.Context,
	mux *runtime.ServeMux,
	marshaler runtime.Marshaler,
	w http.ResponseWriter,
	r *http.Request,
	recv func() (proto.Message, error),
	options ...func(context.Context, http.ResponseWriter, proto.Message) error,
)

// ForwardStreamsBy has all streams passed on by f. To be called once, before any request.
func ForwardStreamsBy(f StreamForwarder) {
	forward_OpenAIService_StreamChatCompletion_0 = f
	forward_OpenAIService_StreamCompletion_0 = f
}
