package shape

import (
	"strconv"

	"google.golang.org/protobuf/proto"

	"tandem/gateway/gen/openai"
)

// AppendChunk writes a piece of a stream as Append does, without reflection: a gateway does little
// else. With `usageNull`, usage that is absent is null, as OpenAI has it where it was asked for.
func AppendChunk(out []byte, message proto.Message, usageNull bool) []byte {
	switch piece := message.(type) {
	case *openai.StreamChatCompletionResponse:
		return appendChatChunk(out, piece, usageNull)
	case *openai.StreamCompletionResponse:
		return appendTextChunk(out, piece, usageNull)
	default:
		panic("no rule for pieces of " + string(message.ProtoReflect().Descriptor().FullName()))
	}
}

func appendChatChunk(out []byte, piece *openai.StreamChatCompletionResponse, usageNull bool) []byte {
	out = appendHead(out, piece.Id, piece.Object, piece.Created, piece.Model)
	out = append(out, `"choices":[`...)
	for i, choice := range piece.Choices {
		if i > 0 {
			out = append(out, ',')
		}
		out = appendChunkChoice(out, choice)
	}
	out = append(out, ']')
	out = appendTail(out, piece.Usage, usageNull, piece.SystemFingerprint)
	if piece.ServiceTier != nil {
		out = append(out, `,"service_tier":`...)
		out = appendString(out, *piece.ServiceTier)
	}
	return append(out, '}')
}

func appendTextChunk(out []byte, piece *openai.StreamCompletionResponse, usageNull bool) []byte {
	out = appendHead(out, piece.Id, piece.Object, piece.Created, piece.Model)
	out = append(out, `"choices":[`...)
	for i, choice := range piece.Choices {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, '{')
		if choice.Index != nil {
			out = append(out, `"index":`...)
			out = strconv.AppendUint(out, uint64(*choice.Index), 10)
			out = append(out, ',')
		}
		out = append(out, `"text":`...)
		out = appendString(out, choice.GetText())
		out = append(out, `,"logprobs":`...)
		out = appendOrNull(out, choice.Logprobs)
		out = append(out, `,"finish_reason":`...)
		out = appendStringOrNull(out, choice.FinishReason)
		out = append(out, '}')
	}
	out = append(out, ']')
	out = appendTail(out, piece.Usage, usageNull, piece.SystemFingerprint)
	return append(out, '}')
}

// appendHead writes what stands before the choices, a comma after it included.
func appendHead(out []byte, id, object string, created *uint32, model string) []byte {
	out = append(out, '{')
	if id != "" {
		out = append(out, `"id":`...)
		out = append(appendString(out, id), ',')
	}
	if object != "" {
		out = append(out, `"object":`...)
		out = append(appendString(out, object), ',')
	}
	if created != nil {
		out = append(out, `"created":`...)
		out = append(strconv.AppendUint(out, uint64(*created), 10), ',')
	}
	if model != "" {
		out = append(out, `"model":`...)
		out = append(appendString(out, model), ',')
	}
	return out
}

// appendTail writes what comes after the choices.
func appendTail(out []byte, usage *openai.Usage, usageNull bool, fingerprint string) []byte {
	if usage != nil || usageNull {
		out = append(out, `,"usage":`...)
		out = appendOrNull(out, usage)
	}
	if fingerprint != "" {
		out = append(out, `,"system_fingerprint":`...)
		out = appendString(out, fingerprint)
	}
	return out
}

func appendChunkChoice(out []byte, choice *openai.ChunkChoice) []byte {
	out = append(out, '{')
	if choice.Index != nil {
		out = append(out, `"index":`...)
		out = append(strconv.AppendUint(out, uint64(*choice.Index), 10), ',')
	}
	out = append(out, `"delta":`...)
	out = appendDelta(out, choice.Delta)
	out = append(out, `,"logprobs":`...)
	out = appendOrNull(out, choice.Logprobs)
	out = append(out, `,"finish_reason":`...)
	out = appendStringOrNull(out, choice.FinishReason)
	return append(out, '}')
}

func appendDelta(out []byte, delta *openai.DeltaMessage) []byte {
	if delta == nil {
		return append(out, "{}"...)
	}
	out = append(out, '{')
	start := len(out)
	out = appendPair(out, start, `"role":`, delta.Role)
	out = appendPair(out, start, `"content":`, delta.Content)
	out = appendPair(out, start, `"reasoning_content":`, delta.ReasoningContent)
	if len(delta.ToolCalls) > 0 {
		out = appendComma(out, start)
		out = append(out, `"tool_calls":[`...)
		for i, call := range delta.ToolCalls {
			if i > 0 {
				out = append(out, ',')
			}
			out = appendCall(out, call)
		}
		out = append(out, ']')
	}
	return append(out, '}')
}

func appendCall(out []byte, call *openai.ToolCall) []byte {
	out = append(out, '{')
	start := len(out)
	if call.Index != nil {
		out = append(out, `"index":`...)
		out = strconv.AppendUint(out, uint64(*call.Index), 10)
	}
	out = appendPair(out, start, `"id":`, call.Id)
	out = appendPair(out, start, `"type":`, call.Type)
	if call.Function != nil {
		out = appendComma(out, start)
		out = append(out, `"function":{`...)
		inner := len(out)
		out = appendPair(out, inner, `"name":`, call.Function.Name)
		out = appendPair(out, inner, `"arguments":`, call.Function.Arguments)
		out = append(out, '}')
	}
	return append(out, '}')
}

// appendPair writes a field that is there; `start` is where the object's first one stands.
func appendPair(out []byte, start int, name string, text *string) []byte {
	if text == nil {
		return out
	}
	out = appendComma(out, start)
	out = append(out, name...)
	return appendString(out, *text)
}

func appendComma(out []byte, start int) []byte {
	if len(out) > start {
		out = append(out, ',')
	}
	return out
}

func appendStringOrNull(out []byte, text *string) []byte {
	if text == nil {
		return append(out, "null"...)
	}
	return appendString(out, *text)
}

// appendOrNull writes what is rare in a stream, by reflection.
func appendOrNull[M interface {
	comparable
	proto.Message
}](out []byte, message M) []byte {
	var none M
	if message == none {
		return append(out, "null"...)
	}
	return Append(out, message)
}
