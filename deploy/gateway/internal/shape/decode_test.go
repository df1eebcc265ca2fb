package shape

import (
	"errors"
	"math/rand"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"tandem/gateway/gen/openai"
)

func decoded(t *testing.T, text string) *openai.CreateChatCompletionRequest {
	t.Helper()
	into := &openai.CreateChatCompletionRequest{}
	if err := Decode([]byte(text), into); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return into
}

func TestEveryKindOfFieldIsRead(t *testing.T) {
	got := decoded(t, ` {"model":"m\u00e9\ud83d\ude00\n","messages":[
	  {"role":"user","content":"hé"},
	  {"role":"user","content":[{"type":"text","text":"x"}]},
	  {"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]}],
	  "temperature":0.5,"n":2,"seed":-9007199254740993,"stream":false,"stream_options":{"include_usage":true},
	  "stop":["a","b"],"logit_bias":{"50256":-100,"7":1.5},"metadata":{"a":"b"},"max_tokens":16.0,
	  "stop_token_ids":[1,2],"priority":-3,"chat_template_kwargs":{"enable_thinking":false},"top_k":1e1} `)
	switch {
	case got.Model != "mé😀\n":
		t.Error("model", got.Model)
	case len(got.Messages) != 3 || got.Messages[0].Content.GetStringValue() != "hé":
		t.Error("messages", got.Messages)
	case got.Messages[1].Content.GetListValue().GetValues()[0].GetStructValue().GetFields()["text"].GetStringValue() != "x":
		t.Error("parts", got.Messages[1])
	case got.Messages[2].Content != nil || got.Messages[2].ToolCalls[0].GetFunction().GetName() != "f":
		t.Error("calls", got.Messages[2])
	case got.GetTemperature() != 0.5, got.GetN() != 2, got.GetSeed() != -9007199254740993, got.GetMaxTokens() != 16:
		t.Error("numbers", got)
	case got.Stream == nil || got.GetStream(), !got.GetStreamOptions().GetIncludeUsage():
		t.Error("stream", got)
	case len(got.Stop.GetListValue().GetValues()) != 2, got.LogitBias["50256"] != -100, got.Metadata["a"] != "b":
		t.Error("collections", got)
	case got.StopTokenIds[1] != 2, got.GetPriority() != -3, got.GetTopK() != 10:
		t.Error("more numbers", got)
	case got.ChatTemplateKwargs.GetFields()["enable_thinking"].GetBoolValue():
		t.Error("kwargs", got)
	}
}

func TestSchemasKeepTheirBytes(t *testing.T) {
	schema := `{ "z":{"type":"string" , "const":"\u00e9"},"a":[1.0, {"y":1,"b":2}] }`
	got := decoded(t, `{"tools":[{"type":"function","function":{"name":"f","parameters":`+schema+
		`}}],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":`+schema+`}}}`)
	if got.Tools[0].Function.GetParameters() != schema {
		t.Error(got.Tools[0].Function.GetParameters())
	}
	if got.ResponseFormat.JsonSchema.GetSchema() != schema {
		t.Error(got.ResponseFormat.JsonSchema.GetSchema())
	}
}

func TestUnknownFieldsNullsAndRepeatedNames(t *testing.T) {
	got := decoded(t, `{"unknown":{"deep":[1,{"x":null}]},"temperature":null,"stop":null,
	  "messages":[{"role":"a"},{"role":"b"}],"messages":[{"role":"c","extra":1}],"model":"x","model":"y"}`)
	if got.Temperature != nil || got.Stop != nil || len(got.Messages) != 1 ||
		got.Messages[0].Role != "c" || got.Model != "y" {
		t.Error(got)
	}
}

func TestWrongTypesNameTheField(t *testing.T) {
	for text, want := range map[string][3]string{
		`{"temperature":"hot"}`: {"temperature", "invalid_type",
			"Invalid type for 'temperature': expected a number, but got a string instead."},
		`{"messages":{}}`: {"messages", "invalid_type",
			"Invalid type for 'messages': expected an array, but got an object instead."},
		`{"messages":[1]}`: {"messages[0]", "invalid_type",
			"Invalid type for 'messages[0]': expected an object, but got an integer instead."},
		`{"messages":[{"role":"a"},{"role":true}]}`: {"messages[1].role", "invalid_type",
			"Invalid type for 'messages[1].role': expected a string, but got a boolean instead."},
		`{"n":1.5}`: {"n", "invalid_type",
			"Invalid type for 'n': expected an integer, but got a decimal number instead."},
		`{"n":-1}`: {"n", "integer_below_min_value",
			"Invalid 'n': integer below minimum value. Expected a value >= 0, but got -1 instead."},
		`{"n":4294967296}`: {"n", "integer_above_max_value",
			"Invalid 'n': integer above maximum value. Expected a value <= 4294967295, but got 4294967296 instead."},
		`{"seed":1e30}`: {"seed", "integer_above_max_value",
			"Invalid 'seed': integer above maximum value. Expected a value <= 9223372036854775807, but got 1e30 instead."},
		`{"temperature":1e999}`: {"temperature", "invalid_value",
			"Invalid 'temperature': 1e999 is beyond what a number can be."},
		`{"stream":"yes"}`: {"stream", "invalid_type",
			"Invalid type for 'stream': expected a boolean, but got a string instead."},
		`{"logit_bias":{"5":"x"}}`: {"logit_bias.5", "invalid_type",
			"Invalid type for 'logit_bias.5': expected a number, but got a string instead."},
		`{"stop_token_ids":[1,"x"]}`: {"stop_token_ids[1]", "invalid_type",
			"Invalid type for 'stop_token_ids[1]': expected an integer, but got a string instead."},
		`{"guided_choice":["x",null]}`: {"guided_choice[1]", "invalid_type",
			"Invalid type for 'guided_choice[1]': expected a string, but got null instead."},
		`{"tools":[{"type":"function","function":{"name":"f","parameters":"{}"}}]}`: {
			"tools[0].function.parameters", "invalid_type",
			"Invalid type for 'tools[0].function.parameters': expected an object, but got a string instead."},
		`{"chat_template_kwargs":[]}`: {"chat_template_kwargs", "invalid_type",
			"Invalid type for 'chat_template_kwargs': expected an object, but got an array instead."},
		`{"stop":` + strings.Repeat("[", 30) + strings.Repeat("]", 30) + `}`: {"stop", "invalid_value",
			"Invalid 'stop': more than 24 arrays and objects in each other."},
		`[]`: {"", "invalid_type", "Invalid type for the body: expected an object, but got an array instead."},
	} {
		var bad *BodyError
		err := Decode([]byte(text), &openai.CreateChatCompletionRequest{})
		if !errors.As(err, &bad) || [3]string{bad.Param, bad.Code, bad.Message} != want {
			t.Errorf("%s: %+v", text, err)
		}
	}
}

func TestWhatIsNoJSONIsRefused(t *testing.T) {
	for _, text := range []string{
		``, ` `, `{`, `{"model"`, `{"model":}`, `{"model":"x"`, `{"model":"x",}`, `{"model":"x"} x`, `{"a":tru}`,
		`{"a":[1,]}`, `{"a":01}`, `{"a":1.}`, `{"a":1e}`, `{"a":-}`, `{"a":.5}`, `{"a":+1}`, `{"a":NaN}`,
		"{\"a\":\"\x01\"}", "{\"a\":\"\xff\"}", `{"a":"\x"}`, `{"a":"\u12"}`, `{"a":"\ud800"}`, `{"a":"\ud800\u0041"}`,
		`{"a":"\udc00"}`, `{"a":"\`, `{'a':1}`, `{a:1}`, "{\"a\":1}\x00", `{"temperature":nul}`, `{"n":}`,
		`{"a":` + strings.Repeat("[", 10000),
	} {
		var bad *BodyError
		err := Decode([]byte(text), &openai.CreateChatCompletionRequest{})
		if !errors.As(err, &bad) || bad.Code != "invalid_json" ||
			!strings.HasPrefix(bad.Message, "We could not parse the JSON body of your request: ") {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

func TestStreamed(t *testing.T) {
	for text, want := range map[string]bool{
		`{"stream":true}`: true,
		` { "x" : {"stream":false}, "stream" : true } `: true,
		`{"str\u0065am":true}`:                          true,
		`{"stream":false}`:                              false,
		`{"stream":true,"stream":false}`:                false,
		`{"x":{"stream":true}}`:                         false,
		`{"x":"\"stream\":true"}`:                       false,
		`{"stream":"true"}`:                             false,
		`{"stream":true`:                                false,
		`[]`:                                            false,
		``:                                              false,
	} {
		if got := Streamed([]byte(text)); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}

// Whatever is sent, the answer is a message that can be sent on, or an error of the body.
func TestMutatedBodies(t *testing.T) {
	seeds := []string{
		`{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"\u00e9\ud83d\ude00"}]}],"n":2,"stop":["a"]}`,
		`{"tools":[{"type":"function","function":{"name":"f","parameters":{"a":[{}]}}}],"logit_bias":{"1":-1.5e-3}}`,
	}
	random := rand.New(rand.NewSource(1))
	alphabet := []byte("{}[]\",:\\u0129eE+-.ntf \x00\x80\xed\xf0")
	for range 50000 {
		text := []byte(seeds[random.Intn(len(seeds))])
		for range 1 + random.Intn(4) {
			at := random.Intn(len(text))
			switch random.Intn(3) {
			case 0:
				text[at] = alphabet[random.Intn(len(alphabet))]
			case 1:
				text = append(text[:at], text[at+1:]...)
			default:
				text = append(text[:at], append([]byte{alphabet[random.Intn(len(alphabet))]}, text[at:]...)...)
			}
		}
		into := &openai.CreateChatCompletionRequest{}
		err := Decode(text, into)
		var bad *BodyError
		if err != nil && !errors.As(err, &bad) {
			t.Fatalf("%q: %v", text, err)
		}
		if err == nil {
			if _, err := proto.Marshal(into); err != nil {
				t.Fatalf("%q: %v", text, err)
			}
		}
	}
}
