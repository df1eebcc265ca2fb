// Package faults turns what went wrong into OpenAI's errors: one table, and how it is read.
package faults

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tandem/gateway/internal/shape"
)

// Fault is an error as a client sees it.
type Fault struct {
	// Status is HTTP's.
	Status int
	// Type, Code and Param are OpenAI's; an empty Code or Param is null.
	Type, Code, Param string
	// Message is for a person.
	Message string
	// RetryAfter is how long to wait before another try; 0: nobody said.
	RetryAfter time.Duration
	// Final: clients that would try again by the status alone should not.
	Final bool
	// Detail is for the log: what Message does not tell.
	Detail string
}

type row struct {
	status int
	kind   string
	code   string
	final  bool
}

const (
	invalid  = "invalid_request_error"
	limited  = "rate_limit_error"
	broken   = "server_error"
	tooSlow  = "timeout_error"
	noRights = "permission_error"
)

// byReason are the reasons of docs/errors.md that say more than their gRPC code.
var byReason = map[string]row{
	"INVALID_REQUEST":   {400, invalid, "invalid_value", false},
	"GUIDE_FAILED":      {400, invalid, "guide_failed", false},
	"UNKNOWN_MODEL":     {404, invalid, "model_not_found", false},
	"UNKNOWN_ADAPTER":   {404, invalid, "model_not_found", false},
	"DUPLICATE_REQUEST": {409, invalid, "duplicate_request", true},
	// The pool is as large as it is: another try finds the same.
	"OUT_OF_BLOCKS": {503, broken, "out_of_blocks", false},
}

// byCode is for all other reasons, and where there is none. An empty code is the reason's name.
var byCode = map[codes.Code]row{
	codes.Canceled:          {499, invalid, "request_cancelled", false},
	codes.Unknown:           {500, broken, "", false},
	codes.InvalidArgument:   {400, invalid, "", false},
	codes.DeadlineExceeded:  {504, tooSlow, "deadline_exceeded", true},
	codes.NotFound:          {404, invalid, "", false},
	codes.AlreadyExists:     {409, invalid, "", true},
	codes.PermissionDenied:  {403, noRights, "", false},
	codes.ResourceExhausted: {429, limited, "rate_limit_exceeded", false},
	// What Tandem has of these is about how its processes are set up, not about the request.
	codes.FailedPrecondition: {500, broken, "", true},
	codes.Aborted:            {503, broken, "", false},
	codes.OutOfRange:         {400, invalid, "", false},
	codes.Unimplemented:      {501, broken, "", true},
	codes.Internal:           {500, broken, "", false},
	codes.Unavailable:        {503, broken, "", false},
	codes.DataLoss:           {500, broken, "", false},
	codes.Unauthenticated:    {401, invalid, "invalid_api_key", false},
}

// vague replaces messages of the transport, which name addresses behind the gateway.
var vague = map[codes.Code]string{
	codes.Unavailable: "The service can't be reached at the moment.",
	codes.Internal:    "The service failed to answer.",
	codes.Unknown:     "The service failed to answer.",
}

// Faults of the gateway itself.
var (
	Draining = Fault{Status: 503, Type: broken, Code: "draining", RetryAfter: time.Second,
		Message: "The gateway is shutting down; another one takes the request."}
	TooManyRequests = Fault{Status: 429, Type: limited, Code: "rate_limit_exceeded", RetryAfter: time.Second,
		Message: "The gateway serves as many requests as it may."}
	TooManyStreams = Fault{Status: 429, Type: limited, Code: "rate_limit_exceeded", RetryAfter: time.Second,
		Message: "The gateway serves as many streams as it may."}
	SlowBody = Fault{Status: 408, Type: invalid, Code: "request_timeout",
		Message: "The request's body did not arrive in time."}
	Gone = Fault{Status: 499, Type: invalid, Code: "request_cancelled",
		Message: "The client went away."}
	Bug = Fault{Status: 500, Type: broken, Code: "internal", Message: "The gateway failed to answer."}
)

// Invalid is a refusal of the request as it stands.
func Invalid(httpStatus int, code, param, message string) Fault {
	return Fault{Status: httpStatus, Type: invalid, Code: code, Param: param, Message: message}
}

// Of is the fault for any error: of a body, of a call, of grpc-gateway. `ctx` is the request's; if it
// was ended on this side, its cause counts.
func Of(ctx context.Context, err error) Fault {
	var cause *Cause
	if errors.As(context.Cause(ctx), &cause) {
		return cause.Fault
	}
	var body *shape.BodyError
	if errors.As(err, &body) {
		return Invalid(400, body.Code, body.Param, body.Message)
	}
	var routing *runtime.HTTPStatusError
	if errors.As(err, &routing) {
		return Invalid(routing.HTTPStatus, "", "", routing.Err.Error())
	}
	return ofStatus(status.Convert(err))
}

// Cause ends a context with a fault.
type Cause struct{ Fault Fault }

func (c *Cause) Error() string { return c.Fault.Message }

func ofStatus(s *status.Status) Fault {
	var info *errdetails.ErrorInfo
	fault := Fault{Message: s.Message()}
	for _, detail := range s.Details() {
		switch known := detail.(type) {
		case *errdetails.ErrorInfo:
			info = known
		case *errdetails.RetryInfo:
			fault.RetryAfter = known.GetRetryDelay().AsDuration()
		case *errdetails.BadRequest:
			if v := known.GetFieldViolations(); len(v) > 0 {
				fault.Param = v[0].GetField()
			}
		}
	}
	chosen, known := byReason[info.GetReason()]
	if !known {
		chosen, known = byCode[s.Code()]
	}
	if !known {
		chosen = byCode[codes.Unknown]
	}
	if info == nil {
		chosen = ofTransport(s, chosen, &fault)
	}
	fault.Status, fault.Type, fault.Final = chosen.status, chosen.kind, chosen.final
	fault.Code = chosen.code
	if fault.Code == "" {
		fault.Code = strings.ToLower(info.GetReason())
	}
	metadata := info.GetMetadata()
	if metadata["code"] != "" {
		fault.Code = metadata["code"]
	}
	if fault.Param == "" {
		fault.Param = metadata["field"]
	}
	if fault.Param == "" && fault.Code == "model_not_found" {
		fault.Param = "model"
	}
	return fault
}

// ofTransport is for statuses that no service of Tandem made: gRPC's own.
func ofTransport(s *status.Status, chosen row, fault *Fault) row {
	if s.Code() == codes.ResourceExhausted && strings.Contains(s.Message(), "larger than max") {
		if strings.HasPrefix(s.Message(), "grpc: received") { // by this side: the answer is too large
			fault.Message, fault.Detail = vague[codes.Internal], s.Message()
			return byCode[codes.Internal]
		}
		fault.Message = "The request is larger than a frontend takes (server.max_message_bytes)."
		return row{413, invalid, "request_too_large", false}
	}
	if words, hide := vague[s.Code()]; hide {
		fault.Message, fault.Detail = words, s.Message()
	}
	if s.Code() == codes.DeadlineExceeded {
		fault.Message = "The request's deadline passed."
	}
	return chosen
}

type envelope struct {
	Error inner `json:"error"`
}

type inner struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    *string `json:"code"`
}

// JSON is the fault in OpenAI's shape.
func (f Fault) JSON() []byte {
	told := envelope{inner{Message: f.Message, Type: f.Type}}
	if f.Param != "" {
		told.Error.Param = &f.Param
	}
	if f.Code != "" {
		told.Error.Code = &f.Code
	}
	text, err := json.Marshal(told)
	if err != nil {
		panic(err) // strings can't fail
	}
	return text
}

// Write answers with the fault. OpenAI's clients try again by status unless x-should-retry tells
// them otherwise, and know retry-after-ms.
func (f Fault) Write(w http.ResponseWriter) {
	body := f.JSON()
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	if f.RetryAfter > 0 {
		header.Set("Retry-After", strconv.Itoa(int(math.Ceil(f.RetryAfter.Seconds()))))
		header.Set("Retry-After-Ms", strconv.FormatInt(f.RetryAfter.Milliseconds(), 10))
	}
	if f.Final {
		header.Set("X-Should-Retry", "false")
	}
	if f.Status == http.StatusUnauthorized {
		header.Set("Www-Authenticate", "Bearer")
	}
	w.WriteHeader(f.Status)
	_, _ = w.Write(body) // a client that is gone has no use for it
}
