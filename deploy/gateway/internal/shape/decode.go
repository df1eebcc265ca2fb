package shape

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
)

// maxValueDepth bounds google.protobuf.Value: an object in it is three messages deep, and protobuf
// refuses to read messages that are more than 100 deep.
const maxValueDepth = 24

// asText are the fields that are JSON text in a message and the object itself in JSON, so that
// the order of its keys is kept.
var asText = map[protoreflect.FullName]bool{
	"tandem.openai.v1.FunctionDefinition.parameters": true,
	"tandem.openai.v1.JsonSchemaFormat.schema":       true,
}

// plan says how fields of a message are read, by their name in JSON.
type plan map[string]protoreflect.FieldDescriptor

var plans sync.Map // of plan by protoreflect.FullName

func planOf(message protoreflect.MessageDescriptor) plan {
	if known, ok := plans.Load(message.FullName()); ok {
		return known.(plan)
	}
	fields := message.Fields()
	made := make(plan, fields.Len())
	for i := range fields.Len() {
		made[string(fields.Get(i).Name())] = fields.Get(i)
	}
	plans.Store(message.FullName(), made)
	return made
}

// Decode reads a JSON object into a message that is empty. Fields that it does not have are
// ignored; null is as if the field were absent; of a field named twice the last one counts.
// Every error is a *BodyError.
func Decode(body []byte, into proto.Message) error {
	c := &cursor{data: body}
	if c.peek(); c.at == len(body) {
		return c.broken("it is empty,")
	}
	if err := c.message(into.ProtoReflect(), ""); err != nil {
		return err
	}
	return c.end()
}

func (c *cursor) message(into protoreflect.Message, path string) error {
	if c.peek() != '{' {
		return c.wrong(path, "an object")
	}
	fields := planOf(into.Descriptor())
	return c.object(func(key string) error {
		field, known := fields[key]
		if !known {
			return c.skip()
		}
		into.Clear(field)
		if c.peek() == 'n' {
			return c.word("null")
		}
		return c.field(into, field, joined(path, key))
	})
}

func joined(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func (c *cursor) field(into protoreflect.Message, field protoreflect.FieldDescriptor, path string) error {
	switch {
	case field.IsMap():
		return c.pairs(into.Mutable(field).Map(), field.MapValue(), path)
	case field.IsList():
		return c.list(into.Mutable(field).List(), field, path)
	case field.Message() != nil:
		return c.submessage(into.Mutable(field).Message(), path)
	}
	value, err := c.scalar(field, path)
	if err == nil {
		into.Set(field, value)
	}
	return err
}

func (c *cursor) pairs(into protoreflect.Map, kind protoreflect.FieldDescriptor, path string) error {
	if c.peek() != '{' {
		return c.wrong(path, "an object")
	}
	return c.object(func(key string) error {
		value, err := c.scalar(kind, joined(path, key))
		if err == nil {
			into.Set(protoreflect.ValueOfString(key).MapKey(), value)
		}
		return err
	})
}

func (c *cursor) list(into protoreflect.List, field protoreflect.FieldDescriptor, path string) error {
	if c.peek() != '[' {
		return c.wrong(path, "an array")
	}
	return c.array(func(i int) error {
		if field.Message() != nil {
			return c.submessage(into.AppendMutable().Message(), at(path, i))
		}
		c.peek()
		value, err := c.scalarAt(field, path, i)
		if err == nil {
			into.Append(value)
		}
		return err
	})
}

// scalarAt is scalar for an item, whose path is put together only where it is needed.
func (c *cursor) scalarAt(field protoreflect.FieldDescriptor, path string, i int) (protoreflect.Value, error) {
	value, err := c.scalar(field, path)
	if bad, ok := err.(*BodyError); ok && bad.Param == path {
		full := at(path, i)
		bad.Message = strings.Replace(bad.Message, "'"+path+"'", "'"+full+"'", 1)
		bad.Param = full
	}
	return value, err
}

func at(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

func (c *cursor) submessage(into protoreflect.Message, path string) error {
	switch known := into.Interface().(type) {
	case *structpb.Value:
		value, err := c.value(path, maxValueDepth)
		if err == nil {
			known.Kind = value.Kind
		}
		return err
	case *structpb.Struct:
		if c.peek() != '{' {
			return c.wrong(path, "an object")
		}
		fields, err := c.values(path, maxValueDepth)
		known.Fields = fields
		return err
	default:
		return c.message(into, path)
	}
}

func (c *cursor) scalar(field protoreflect.FieldDescriptor, path string) (protoreflect.Value, error) {
	var none protoreflect.Value
	first := c.peek()
	switch kind := field.Kind(); kind {
	case protoreflect.StringKind:
		if asText[field.FullName()] {
			if first != '{' {
				return none, c.wrong(path, "an object")
			}
			text, err := c.raw()
			return protoreflect.ValueOfString(string(text)), err
		}
		if first != '"' {
			return none, c.wrong(path, "a string")
		}
		text, err := c.text()
		return protoreflect.ValueOfString(text), err
	case protoreflect.BoolKind:
		switch first {
		case 't':
			return protoreflect.ValueOfBool(true), c.word("true")
		case 'f':
			return protoreflect.ValueOfBool(false), c.word("false")
		}
		return none, c.wrong(path, "a boolean")
	case protoreflect.DoubleKind:
		if first != '-' && (first < '0' || first > '9') {
			return none, c.wrong(path, "a number")
		}
		number, err := c.float(path)
		return protoreflect.ValueOfFloat64(number), err
	case protoreflect.Uint32Kind, protoreflect.Int32Kind, protoreflect.Int64Kind:
		if first != '-' && (first < '0' || first > '9') {
			return none, c.wrong(path, "an integer")
		}
		return c.integer(kind, path)
	default:
		// A field of a new kind in the proto: a bug of this program, found by its tests.
		panic("no rule for " + string(field.FullName()))
	}
}

func (c *cursor) float(path string) (float64, error) {
	text, err := c.number()
	if err != nil {
		return 0, err
	}
	number, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return 0, &BodyError{path, "invalid_value",
			fmt.Sprintf("Invalid '%s': %s is beyond what a number can be.", path, cut(text))}
	}
	return number, nil
}

// bounds of the integers that messages hold.
var bounds = map[protoreflect.Kind][2]int64{
	protoreflect.Uint32Kind: {0, math.MaxUint32},
	protoreflect.Int32Kind:  {math.MinInt32, math.MaxInt32},
	protoreflect.Int64Kind:  {math.MinInt64, math.MaxInt64},
}

func (c *cursor) integer(kind protoreflect.Kind, path string) (protoreflect.Value, error) {
	var none protoreflect.Value
	start := c.at
	text, err := c.number()
	if err != nil {
		return none, err
	}
	number, err := strconv.ParseInt(text, 10, 64)
	if err != nil && strings.ContainsAny(text, ".eE") {
		// 16.0 and 1e3 are integers, too, as JSON has it.
		float, ferr := strconv.ParseFloat(text, 64)
		if ferr == nil && (float != math.Trunc(float) || math.IsInf(float, 0)) {
			c.at = start
			return none, c.wrong(path, "an integer")
		}
		if ferr == nil && math.Abs(float) <= 1<<53 {
			number, err = int64(float), nil
		}
	}
	limits := bounds[kind]
	switch below := text[0] == '-'; {
	case err != nil && below, err == nil && number < limits[0]:
		return none, &BodyError{path, "integer_below_min_value", fmt.Sprintf(
			"Invalid '%s': integer below minimum value. Expected a value >= %d, but got %s instead.",
			path, limits[0], cut(text))}
	case err != nil, number > limits[1]:
		return none, &BodyError{path, "integer_above_max_value", fmt.Sprintf(
			"Invalid '%s': integer above maximum value. Expected a value <= %d, but got %s instead.",
			path, limits[1], cut(text))}
	}
	switch kind {
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(number)), nil
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(number)), nil
	default:
		return protoreflect.ValueOfInt64(number), nil
	}
}

// value reads anything; `deeper` is how deep it may still go.
func (c *cursor) value(path string, deeper int) (*structpb.Value, error) {
	switch c.peek() {
	case 'n':
		return structpb.NewNullValue(), c.word("null")
	case 't':
		return structpb.NewBoolValue(true), c.word("true")
	case 'f':
		return structpb.NewBoolValue(false), c.word("false")
	case '"':
		text, err := c.text()
		return structpb.NewStringValue(text), err
	case '{':
		fields, err := c.values(path, deeper)
		return structpb.NewStructValue(&structpb.Struct{Fields: fields}), err
	case '[':
		if deeper == 0 {
			return nil, tooDeep(path)
		}
		list := &structpb.ListValue{}
		err := c.array(func(int) error {
			item, err := c.value(path, deeper-1)
			list.Values = append(list.Values, item)
			return err
		})
		return structpb.NewListValue(list), err
	default:
		number, err := c.float(path)
		return structpb.NewNumberValue(number), err
	}
}

func (c *cursor) values(path string, deeper int) (map[string]*structpb.Value, error) {
	if deeper == 0 {
		return nil, tooDeep(path)
	}
	fields := map[string]*structpb.Value{}
	err := c.object(func(key string) error {
		value, err := c.value(path, deeper-1)
		fields[key] = value
		return err
	})
	return fields, err
}

func tooDeep(path string) error {
	return &BodyError{path, "invalid_value", fmt.Sprintf(
		"Invalid '%s': more than %d arrays and objects in each other.", path, maxValueDepth)}
}

// wrong is the error for a value of another type than `expected`; of text that is no JSON, that.
func (c *cursor) wrong(path, expected string) error {
	got := "an integer"
	switch first := c.peek(); {
	case first == '"':
		got = "a string"
	case first == '{':
		got = "an object"
	case first == '[':
		got = "an array"
	case first == 't' || first == 'f':
		got = "a boolean"
	case first == 'n':
		got = "null"
	case first != '-' && (first < '0' || first > '9'):
		return c.unexpected()
	}
	text, err := c.raw()
	if err != nil {
		return err
	}
	if got == "an integer" && strings.ContainsAny(string(text), ".eE") {
		got = "a decimal number"
	}
	if path == "" {
		return &BodyError{"", "invalid_type", fmt.Sprintf(
			"Invalid type for the body: expected %s, but got %s instead.", expected, got)}
	}
	return &BodyError{path, "invalid_type", fmt.Sprintf(
		"Invalid type for '%s': expected %s, but got %s instead.", path, expected, got)}
}

func cut(text string) string {
	if len(text) > 40 {
		return text[:37] + "..."
	}
	return text
}
