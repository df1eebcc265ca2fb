package shape

import (
	"fmt"
	"io"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/protobuf/proto"

	"tandem/gateway/gen/openai"
)

// Body is a request's body, read and within its limits. The front door puts it in the place of the
// request's own, so that what came of decoding it is not lost in the words of a status.
type Body struct {
	// Data is the JSON text.
	Data []byte
	// Err is what is wrong with it, once that was found.
	Err error
	// UsageAsked: usage was asked for in a stream.
	UsageAsked bool
}

// Read is never called: the marshaler takes Data.
func (b *Body) Read([]byte) (int, error) { return 0, io.EOF }

// Close does nothing.
func (b *Body) Close() error { return nil }

// Marshaler is grpc-gateway's way to JSON and back.
type Marshaler struct{}

var _ runtime.Marshaler = Marshaler{}

// ContentType is of answers that are not streamed.
func (Marshaler) ContentType(any) string { return "application/json" }

// Marshal writes a message.
func (Marshaler) Marshal(v any) ([]byte, error) {
	message, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no message", v)
	}
	return Append(make([]byte, 0, 1024), message), nil
}

// Unmarshal reads a message.
func (Marshaler) Unmarshal(data []byte, v any) error {
	message, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no message", v)
	}
	return Decode(data, message)
}

// NewEncoder is not used by answers of OpenAIService, and there for the interface.
func (m Marshaler) NewEncoder(w io.Writer) runtime.Encoder {
	return runtime.EncoderFunc(func(v any) error {
		data, err := m.Marshal(v)
		if err == nil {
			_, err = w.Write(data)
		}
		return err
	})
}

// NewDecoder reads a Body.
func (Marshaler) NewDecoder(r io.Reader) runtime.Decoder {
	return runtime.DecoderFunc(func(v any) error {
		body, ok := r.(*Body)
		if !ok {
			return fmt.Errorf("%T is no body", r)
		}
		body.Err = body.into(v)
		// A stream may last for minutes, and its body is many times what is left of it.
		body.Data = nil
		return body.Err
	})
}

func (b *Body) into(v any) error {
	switch into := v.(type) {
	case **openai.CreateChatCompletionRequest:
		*into = &openai.CreateChatCompletionRequest{}
		err := Decode(b.Data, *into)
		b.UsageAsked = (*into).GetStreamOptions().GetIncludeUsage()
		return err
	case **openai.CreateCompletionRequest:
		*into = &openai.CreateCompletionRequest{}
		err := Decode(b.Data, *into)
		b.UsageAsked = (*into).GetStreamOptions().GetIncludeUsage()
		return err
	case proto.Message:
		return Decode(b.Data, into)
	default:
		return fmt.Errorf("%T is no message", v)
	}
}
