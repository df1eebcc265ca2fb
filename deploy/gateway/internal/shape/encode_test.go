package shape

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"

	"tandem/gateway/gen/openai"
)

func TestAWholeAnswer(t *testing.T) {
	got := string(Append(nil, &openai.CreateChatCompletionResponse{
		Id: "chatcmpl-1", Object: "chat.completion", Created: proto.Uint32(7), Model: "m",
		Choices: []*openai.ChatChoice{{
			Index:        proto.Uint32(0),
			Message:      &openai.AnswerMessage{Role: "assistant", Content: proto.String("")},
			FinishReason: proto.String("stop"),
		}},
		Usage: &openai.Usage{PromptTokens: proto.Uint32(3), CompletionTokens: proto.Uint32(0), TotalTokens: proto.Uint32(3)},
	}))
	want := `{"id":"chatcmpl-1","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,` +
		`"message":{"role":"assistant","content":""},"logprobs":null,"finish_reason":"stop"}],` +
		`"usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3}}`
	if got != want {
		t.Error(got)
	}
}

func TestAnAnswerOfCallsHasNullContent(t *testing.T) {
	got := string(Append(nil, &openai.AnswerMessage{Role: "assistant", ToolCalls: []*openai.ToolCall{{
		Id: proto.String("c"), Type: proto.String("function"),
		Function: &openai.FunctionCall{Name: proto.String("f"), Arguments: proto.String(`{"a":1}`)},
	}}}))
	want := `{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function",` +
		`"function":{"name":"f","arguments":"{\"a\":1}"}}]}`
	if got != want {
		t.Error(got)
	}
}

func TestLogprobsOfAContinuation(t *testing.T) {
	second, _ := structpb.NewStruct(map[string]any{"b": -0.5, "a": math.Inf(-1)})
	got := string(Append(nil, &openai.CompletionLogprobs{
		Tokens: []string{"x", "b"}, TokenLogprobs: []float64{math.NaN(), -0.5},
		TopLogprobs: []*structpb.Struct{{}, second}, TextOffset: []uint32{0, 1},
	}))
	want := `{"tokens":["x","b"],"token_logprobs":[null,-0.5],"top_logprobs":[null,{"a":-9999,"b":-0.5}],"text_offset":[0,1]}`
	if got != want {
		t.Error(got)
	}
	none := string(Append(nil, &openai.CompletionLogprobs{}))
	if none != `{"tokens":[],"token_logprobs":[],"top_logprobs":null,"text_offset":[]}` {
		t.Error(none)
	}
}

func TestEmptyLists(t *testing.T) {
	for want, message := range map[string]proto.Message{
		`{"object":"list","data":[]}`: &openai.ListModelsResponse{Object: "list"},
		`{"count":0,"tokens":[]}`:     &openai.TokenizeResponse{Count: proto.Uint32(0)},
		`{"content":[]}`:              &openai.ChatLogprobs{},
		`{"prompt":""}`:               &openai.DetokenizeResponse{},
		`{"token":"","logprob":-1.5,"bytes":null,"top_logprobs":[]}`: &openai.TokenLogprob{Logprob: proto.Float64(-1.5)},
	} {
		if got := string(Append(nil, message)); got != want {
			t.Errorf("%s: want %s", got, want)
		}
	}
}

func TestChunks(t *testing.T) {
	first := &openai.StreamChatCompletionResponse{
		Id: "i", Object: "chat.completion.chunk", Created: proto.Uint32(1), Model: "m", SystemFingerprint: "fp",
		ServiceTier: proto.String("default"),
		Choices: []*openai.ChunkChoice{{Index: proto.Uint32(0), Delta: &openai.DeltaMessage{
			Role: proto.String("assistant"), Content: proto.String("")}}},
	}
	want := `{"id":"i","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,` +
		`"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],` +
		`"system_fingerprint":"fp","service_tier":"default"}`
	if got := string(AppendChunk(nil, first, false)); got != want {
		t.Error(got)
	}
	withNull := strings.Replace(want, `"system_`, `"usage":null,"system_`, 1)
	if got := string(AppendChunk(nil, first, true)); got != withNull {
		t.Error(got)
	}
	last := &openai.StreamChatCompletionResponse{Choices: []*openai.ChunkChoice{{
		Index: proto.Uint32(1), Delta: &openai.DeltaMessage{}, FinishReason: proto.String("length")}}}
	if got := string(AppendChunk(nil, last, false)); got !=
		`{"choices":[{"index":1,"delta":{},"logprobs":null,"finish_reason":"length"}]}` {
		t.Error(got)
	}
	usage := &openai.StreamCompletionResponse{Usage: &openai.Usage{TotalTokens: proto.Uint32(0)}}
	if got := string(AppendChunk(nil, usage, true)); got != `{"choices":[],"usage":{"total_tokens":0}}` {
		t.Error(got)
	}
}

// The encoder without reflection says what the other one says, of any message.
func TestChunksEqualTheGeneralEncoder(t *testing.T) {
	random := rand.New(rand.NewSource(2))
	for range 3000 {
		for _, piece := range []proto.Message{&openai.StreamChatCompletionResponse{}, &openai.StreamCompletionResponse{}} {
			fill(random, piece.ProtoReflect(), 0)
			general, fast := Append(nil, piece), AppendChunk(nil, piece, false)
			if string(general) != string(fast) {
				t.Fatalf("%s\n%s", general, fast)
			}
			if !json.Valid(fast) {
				t.Fatalf("no JSON: %s", fast)
			}
		}
	}
}

// fill sets about half of all fields, with strings that need care.
func fill(random *rand.Rand, message protoreflect.Message, depth int) {
	fields := message.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if random.Intn(2) == 0 || field.IsMap() {
			continue
		}
		switch {
		case field.IsList():
			list := message.Mutable(field).List()
			for range random.Intn(3) {
				if field.Message() != nil {
					if depth < 6 {
						fill(random, list.AppendMutable().Message(), depth+1)
					}
				} else {
					list.Append(some(random, field.Kind()))
				}
			}
		case field.Message() != nil:
			if depth < 6 {
				fill(random, message.Mutable(field).Message(), depth+1)
			}
		default:
			message.Set(field, some(random, field.Kind()))
		}
	}
}

func some(random *rand.Rand, kind protoreflect.Kind) protoreflect.Value {
	switch kind {
	case protoreflect.StringKind:
		texts := []string{"", "plain", "quo\"te\\", "\n\r\t\b\x00\x1f", "é€😀", "\u0085\u2028\u2029Âé", "</script>"}
		return protoreflect.ValueOfString(texts[random.Intn(len(texts))])
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(random.Intn(3)))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(random.NormFloat64())
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(random.Intn(2) == 0)
	default:
		panic(fmt.Sprint("no example of ", kind))
	}
}

func TestStringsReadBackTheSame(t *testing.T) {
	random := rand.New(rand.NewSource(3))
	runes := []rune("a\"\\\x00\x1f\x7f\u0085\u00a0é€\u2028\u2029\ufffd😀\n")
	for range 5000 {
		var text []rune
		for range random.Intn(12) {
			text = append(text, runes[random.Intn(len(runes))])
		}
		written := appendString(nil, string(text))
		var back string
		if err := json.Unmarshal(written, &back); err != nil || back != string(text) {
			t.Fatalf("%q: %s %v", string(text), written, err)
		}
		if strings.ContainsAny(string(written), "\n\r\u0085\u2028\u2029") {
			t.Fatalf("an end of line in %q", written)
		}
	}
}

func TestNumbersReadBackTheSame(t *testing.T) {
	for _, number := range []float64{0, 1, -0.1, 1e21, 1e-7, 123456789012, math.MaxFloat64, math.SmallestNonzeroFloat64} {
		var back float64
		written := appendFloat(nil, number)
		if err := json.Unmarshal(written, &back); err != nil || back != number {
			t.Errorf("%v: %s", number, written)
		}
	}
}

func BenchmarkChunk(b *testing.B) {
	piece := &openai.StreamChatCompletionResponse{
		Id: "chatcmpl-0123456789abcdef", Object: "chat.completion.chunk", Created: proto.Uint32(1_700_000_000),
		Model: "smollm2-135m-instruct", SystemFingerprint: "fp_0123456789",
		Choices: []*openai.ChunkChoice{{Index: proto.Uint32(0), Delta: &openai.DeltaMessage{Content: proto.String(" token")}}},
	}
	out := make([]byte, 0, 1024)
	for b.Loop() {
		out = AppendChunk(out[:0], piece, false)
	}
}
