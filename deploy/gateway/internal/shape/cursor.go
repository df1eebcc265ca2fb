// Package shape turns OpenAI's JSON into the messages of openai.proto, and those into JSON.
package shape

import (
	"bytes"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds how deep arrays and objects may stand in each other in text that is passed on.
const maxDepth = 256

// BodyError says what is wrong with a request's JSON, in OpenAI's words.
type BodyError struct {
	// Param is the field, such as "messages[0].role"; empty where the text is no JSON at all.
	Param string
	// Code is OpenAI's, such as "invalid_type".
	Code string
	// Message is for a person.
	Message string
}

func (e *BodyError) Error() string { return e.Message }

// cursor reads one JSON text. Its methods begin at the next token and leave `at` behind what they read.
type cursor struct {
	data  []byte
	at    int
	depth int
}

func (c *cursor) broken(why string) error {
	return &BodyError{
		Code: "invalid_json",
		Message: fmt.Sprintf(
			"We could not parse the JSON body of your request: %s at byte %d.", why, c.at),
	}
}

// unexpected is the error for what stands at the cursor.
func (c *cursor) unexpected() error {
	if c.at >= len(c.data) {
		return c.broken("it ends too early,")
	}
	shown := c.data[c.at:min(len(c.data), c.at+utf8.UTFMax)]
	r, _ := utf8.DecodeRune(shown)
	return c.broken(fmt.Sprintf("unexpected %q", r))
}

// peek skips white space and returns the first byte of the next token, 0 at the end.
func (c *cursor) peek() byte {
	for c.at < len(c.data) {
		switch b := c.data[c.at]; b {
		case ' ', '\t', '\n', '\r':
			c.at++
		default:
			return b
		}
	}
	return 0
}

// end is an error unless nothing is left.
func (c *cursor) end() error {
	if c.peek(); c.at < len(c.data) {
		return c.unexpected()
	}
	return nil
}

// word reads true, false or null.
func (c *cursor) word(word string) error {
	if !bytes.HasPrefix(c.data[c.at:], []byte(word)) {
		return c.unexpected()
	}
	c.at += len(word)
	return nil
}

// number reads a number and returns its text.
func (c *cursor) number() (string, error) {
	start := c.at
	if c.at < len(c.data) && c.data[c.at] == '-' {
		c.at++
	}
	switch {
	case c.at < len(c.data) && c.data[c.at] == '0':
		c.at++
	case c.digits() == 0:
		return "", c.unexpected()
	}
	if c.at < len(c.data) && c.data[c.at] == '.' {
		c.at++
		if c.digits() == 0 {
			return "", c.unexpected()
		}
	}
	if c.at < len(c.data) && (c.data[c.at] == 'e' || c.data[c.at] == 'E') {
		c.at++
		if c.at < len(c.data) && (c.data[c.at] == '+' || c.data[c.at] == '-') {
			c.at++
		}
		if c.digits() == 0 {
			return "", c.unexpected()
		}
	}
	return string(c.data[start:c.at]), nil
}

func (c *cursor) digits() int {
	start := c.at
	for c.at < len(c.data) && c.data[c.at] >= '0' && c.data[c.at] <= '9' {
		c.at++
	}
	return c.at - start
}

// text reads a string.
func (c *cursor) text() (string, error) {
	plain, err := c.quoted()
	if err != nil {
		return "", err
	}
	if bytes.IndexByte(plain, '\\') < 0 {
		return string(plain), nil
	}
	return unescaped(plain), nil
}

// quoted reads a string, checks it, and returns what stands between its quotes.
func (c *cursor) quoted() ([]byte, error) {
	if c.peek() != '"' {
		return nil, c.unexpected()
	}
	c.at++
	start := c.at
	for c.at < len(c.data) {
		switch b := c.data[c.at]; {
		case b == '"':
			c.at++
			return c.data[start : c.at-1], nil
		case b == '\\':
			if err := c.escape(); err != nil {
				return nil, err
			}
		case b < 0x20:
			return nil, c.broken("a control character inside a string")
		case b < utf8.RuneSelf:
			c.at++
		default:
			r, size := utf8.DecodeRune(c.data[c.at:])
			if r == utf8.RuneError && size == 1 {
				return nil, c.broken("text that is not UTF-8")
			}
			c.at += size
		}
	}
	return nil, c.unexpected()
}

// escape reads an escape; surrogates must come in pairs, for a message can't hold half of one.
func (c *cursor) escape() error {
	if c.at+1 >= len(c.data) {
		c.at = len(c.data)
		return c.unexpected()
	}
	switch c.data[c.at+1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		c.at += 2
		return nil
	case 'u':
	default:
		return c.broken("an unknown escape")
	}
	first, ok := hex4(c.data[c.at:])
	if !ok {
		return c.broken("an unknown escape")
	}
	if utf16.IsSurrogate(first) {
		second, ok := hex4(c.data[min(len(c.data), c.at+6):])
		if !ok || utf16.DecodeRune(first, second) == utf8.RuneError {
			return c.broken("half of a surrogate pair")
		}
		c.at += 6
	}
	c.at += 6
	return nil
}

// hex4 reads \uXXXX.
func hex4(text []byte) (rune, bool) {
	if len(text) < 6 || text[0] != '\\' || text[1] != 'u' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(text[2:6]), 16, 16)
	return rune(n), err == nil
}

// unescaped undoes the escapes of text that quoted() has checked.
func unescaped(text []byte) string {
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			out = append(out, text[i])
			continue
		}
		i++
		switch text[i] {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r, _ := hex4(text[i-1:])
			i += 4
			if utf16.IsSurrogate(r) {
				second, _ := hex4(text[i+1:])
				r = utf16.DecodeRune(r, second)
				i += 6
			}
			out = utf8.AppendRune(out, r)
		default:
			out = append(out, text[i])
		}
	}
	return string(out)
}

// object reads an object. `each` is called at each value, and must read it.
func (c *cursor) object(each func(key string) error) error {
	return c.nested('{', '}', func(int) error {
		key, err := c.text()
		if err != nil {
			return err
		}
		if c.peek() != ':' {
			return c.unexpected()
		}
		c.at++
		return each(key)
	})
}

// array reads an array. `each` is called at each item, and must read it.
func (c *cursor) array(each func(i int) error) error {
	return c.nested('[', ']', each)
}

func (c *cursor) nested(open, shut byte, each func(i int) error) error {
	if c.peek() != open {
		return c.unexpected()
	}
	if c.depth++; c.depth > maxDepth {
		return c.broken(fmt.Sprintf("more than %d arrays and objects in each other", maxDepth))
	}
	defer func() { c.depth-- }()
	c.at++
	if c.peek() == shut {
		c.at++
		return nil
	}
	for i := 0; ; i++ {
		if err := each(i); err != nil {
			return err
		}
		switch c.peek() {
		case ',':
			c.at++
			c.peek()
		case shut:
			c.at++
			return nil
		default:
			return c.unexpected()
		}
	}
}

// skip reads and checks any value.
func (c *cursor) skip() error {
	switch b := c.peek(); b {
	case '{':
		return c.object(func(string) error { return c.skip() })
	case '[':
		return c.array(func(int) error { return c.skip() })
	case '"':
		_, err := c.quoted()
		return err
	case 't':
		return c.word("true")
	case 'f':
		return c.word("false")
	case 'n':
		return c.word("null")
	default:
		_, err := c.number()
		return err
	}
}

// raw reads any value and returns its text, as it was sent.
func (c *cursor) raw() ([]byte, error) {
	c.peek()
	start := c.at
	err := c.skip()
	return c.data[start:c.at], err
}

// Streamed tells whether the object has "stream": true. Where that can't be said the answer is no:
// reading the body as a whole then says what is wrong with it.
func Streamed(body []byte) bool {
	// Most that do not stream do not mention it, and need no second look.
	if !bytes.Contains(body, []byte(`stream`)) && !bytes.Contains(body, []byte(`\u`)) {
		return false
	}
	c := cursor{data: body}
	streamed := false
	err := c.object(func(key string) error {
		if key != "stream" {
			return c.skip()
		}
		value, err := c.raw()
		streamed = string(value) == "true"
		return err
	})
	return err == nil && streamed
}
