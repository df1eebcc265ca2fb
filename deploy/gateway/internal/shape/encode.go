package shape

import (
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
)

// nulls are fields that OpenAI sends as null where they are absent, or have no items; others
// that are absent are left out.
var nulls = map[protoreflect.FullName]bool{
	"tandem.openai.v1.AnswerMessage.content":           true,
	"tandem.openai.v1.ChatChoice.finish_reason":        true,
	"tandem.openai.v1.ChatChoice.logprobs":             true,
	"tandem.openai.v1.ChunkChoice.finish_reason":       true,
	"tandem.openai.v1.ChunkChoice.logprobs":            true,
	"tandem.openai.v1.CompletionChoice.finish_reason":  true,
	"tandem.openai.v1.CompletionChoice.logprobs":       true,
	"tandem.openai.v1.CompletionLogprobs.top_logprobs": true,
	"tandem.openai.v1.TokenLogprob.bytes":              true,
	"tandem.openai.v1.TopLogprob.bytes":                true,
}

// always are fields that are there even if they are empty.
var always = map[protoreflect.FullName]bool{
	"tandem.openai.v1.ChatLogprobs.content":                 true,
	"tandem.openai.v1.ChunkChoice.delta":                    true,
	"tandem.openai.v1.CompletionChoice.text":                true,
	"tandem.openai.v1.CompletionLogprobs.text_offset":       true,
	"tandem.openai.v1.CompletionLogprobs.token_logprobs":    true,
	"tandem.openai.v1.CompletionLogprobs.tokens":            true,
	"tandem.openai.v1.CreateChatCompletionResponse.choices": true,
	"tandem.openai.v1.CreateCompletionResponse.choices":     true,
	"tandem.openai.v1.DetokenizeResponse.prompt":            true,
	"tandem.openai.v1.ListModelsResponse.data":              true,
	"tandem.openai.v1.StreamChatCompletionResponse.choices": true,
	"tandem.openai.v1.StreamCompletionResponse.choices":     true,
	"tandem.openai.v1.TokenLogprob.token":                   true,
	"tandem.openai.v1.TokenLogprob.top_logprobs":            true,
	"tandem.openai.v1.TokenizeResponse.tokens":              true,
	"tandem.openai.v1.TopLogprob.token":                     true,
}

// lowestLogprob stands for minus infinity, which JSON does not have; it is OpenAI's.
const lowestLogprob = -9999.0

// Append writes a message as OpenAI's JSON.
func Append(out []byte, message proto.Message) []byte {
	return appendMessage(out, message.ProtoReflect())
}

func appendMessage(out []byte, message protoreflect.Message) []byte {
	switch known := message.Interface().(type) {
	case *structpb.Struct:
		return appendStruct(out, known)
	case *structpb.Value:
		return appendValue(out, known)
	}
	out = append(out, '{')
	fields := message.Descriptor().Fields()
	first := true
	for i := range fields.Len() {
		field := fields.Get(i)
		has := message.Has(field)
		if !has && !nulls[field.FullName()] && !always[field.FullName()] {
			continue
		}
		if !first {
			out = append(out, ',')
		}
		first = false
		out = append(out, '"')
		out = append(out, field.Name()...)
		out = append(out, '"', ':')
		if !has && nulls[field.FullName()] {
			out = append(out, "null"...)
			continue
		}
		out = appendField(out, field, message.Get(field))
	}
	return append(out, '}')
}

func appendField(out []byte, field protoreflect.FieldDescriptor, value protoreflect.Value) []byte {
	if !field.IsList() {
		return appendOne(out, field, value)
	}
	out = append(out, '[')
	for i := range value.List().Len() {
		if i > 0 {
			out = append(out, ',')
		}
		out = appendOne(out, field, value.List().Get(i))
	}
	return append(out, ']')
}

func appendOne(out []byte, field protoreflect.FieldDescriptor, value protoreflect.Value) []byte {
	switch field.Kind() {
	case protoreflect.MessageKind:
		return appendMessage(out, value.Message())
	case protoreflect.StringKind:
		return appendString(out, value.String())
	case protoreflect.BoolKind:
		return strconv.AppendBool(out, value.Bool())
	case protoreflect.DoubleKind:
		return appendFloat(out, value.Float())
	case protoreflect.Uint32Kind:
		return strconv.AppendUint(out, value.Uint(), 10)
	case protoreflect.Int32Kind, protoreflect.Int64Kind:
		return strconv.AppendInt(out, value.Int(), 10)
	default:
		panic("no rule for " + string(field.FullName()))
	}
}

// appendStruct writes an object with its keys in order, for a message does not keep theirs. An
// empty one is null: of its answers only log-probabilities are such, and OpenAI sends null where
// there are none.
func appendStruct(out []byte, s *structpb.Struct) []byte {
	if len(s.GetFields()) == 0 {
		return append(out, "null"...)
	}
	keys := make([]string, 0, len(s.Fields))
	for key := range s.Fields {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for i, key := range keys {
		out = append(out, ",{"[b2i(i == 0)])
		out = appendString(out, key)
		out = append(out, ':')
		out = appendValue(out, s.Fields[key])
	}
	return append(out, '}')
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func appendValue(out []byte, value *structpb.Value) []byte {
	switch kind := value.GetKind().(type) {
	case *structpb.Value_BoolValue:
		return strconv.AppendBool(out, kind.BoolValue)
	case *structpb.Value_NumberValue:
		return appendFloat(out, kind.NumberValue)
	case *structpb.Value_StringValue:
		return appendString(out, kind.StringValue)
	case *structpb.Value_StructValue:
		return appendStruct(out, kind.StructValue)
	case *structpb.Value_ListValue:
		out = append(out, '[')
		for i, item := range kind.ListValue.GetValues() {
			if i > 0 {
				out = append(out, ',')
			}
			out = appendValue(out, item)
		}
		return append(out, ']')
	default:
		return append(out, "null"...)
	}
}

// appendFloat writes the shortest text that reads back as the same number. What is no number is
// null: the log-probability of a prompt's first token, which has none.
func appendFloat(out []byte, number float64) []byte {
	switch {
	case math.IsNaN(number):
		return append(out, "null"...)
	case math.IsInf(number, 0):
		number = math.Copysign(lowestLogprob, number)
	}
	format := byte('f')
	if size := math.Abs(number); size != 0 && (size < 1e-6 || size >= 1e21) {
		format = 'e'
	}
	return strconv.AppendFloat(out, number, format, -1, 64)
}

const hex = "0123456789abcdef"

// appendString writes a string. Beyond what JSON asks for it escapes what some readers of lines take
// for an end of one: U+0085, U+2028 and U+2029.
func appendString(out []byte, text string) []byte {
	out = append(out, '"')
	start := 0
	for i := 0; i < len(text); i++ {
		b := text[i]
		if b >= 0x20 && b != '"' && b != '\\' && b != 0xC2 && b != 0xE2 {
			continue
		}
		if b >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(text[i:])
			if r == '\u0085' || r == '\u2028' || r == '\u2029' {
				out = append(out, text[start:i]...)
				out = append(out, '\\', 'u', hex[r>>12], hex[r>>8&15], hex[r>>4&15], hex[r&15])
				start = i + size
			}
			i += size - 1
			continue
		}
		out = append(out, text[start:i]...)
		switch b {
		case '"', '\\':
			out = append(out, '\\', b)
		case '\n':
			out = append(out, '\\', 'n')
		case '\r':
			out = append(out, '\\', 'r')
		case '\t':
			out = append(out, '\\', 't')
		default:
			out = append(out, '\\', 'u', '0', '0', hex[b>>4], hex[b&15])
		}
		start = i + 1
	}
	out = append(out, text[start:]...)
	return append(out, '"')
}
