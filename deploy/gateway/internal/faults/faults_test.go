package faults

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"tandem/gateway/internal/shape"
)

func failed(code codes.Code, message, reason string, metadata map[string]string) error {
	s := status.New(code, message)
	if reason != "" {
		s, _ = s.WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "tandem", Metadata: metadata})
	}
	return s.Err()
}

func TestEveryRow(t *testing.T) {
	type want struct {
		status            int
		kind, code, retry string
	}
	for _, one := range []struct {
		code   codes.Code
		reason string
		want   want
	}{
		{codes.InvalidArgument, "INVALID_REQUEST", want{400, "invalid_request_error", "invalid_value", ""}},
		{codes.InvalidArgument, "GUIDE_FAILED", want{400, "invalid_request_error", "guide_failed", ""}},
		{codes.NotFound, "UNKNOWN_MODEL", want{404, "invalid_request_error", "model_not_found", ""}},
		{codes.NotFound, "UNKNOWN_ADAPTER", want{404, "invalid_request_error", "model_not_found", ""}},
		{codes.AlreadyExists, "DUPLICATE_REQUEST", want{409, "invalid_request_error", "duplicate_request", "false"}},
		{codes.ResourceExhausted, "OUT_OF_BLOCKS", want{503, "server_error", "out_of_blocks", ""}},
		{codes.Canceled, "CANCELLED", want{499, "invalid_request_error", "request_cancelled", ""}},
		{codes.Unknown, "X", want{500, "server_error", "x", ""}},
		{codes.InvalidArgument, "INVALID_FETCH", want{400, "invalid_request_error", "invalid_fetch", ""}},
		{codes.DeadlineExceeded, "DEADLINE", want{504, "timeout_error", "deadline_exceeded", "false"}},
		{codes.NotFound, "BLOCKS_NOT_HELD", want{404, "invalid_request_error", "blocks_not_held", ""}},
		{codes.AlreadyExists, "X", want{409, "invalid_request_error", "x", "false"}},
		{codes.PermissionDenied, "KV_WRONG_TENANT", want{403, "permission_error", "kv_wrong_tenant", ""}},
		{codes.ResourceExhausted, "OVERLOADED", want{429, "rate_limit_error", "rate_limit_exceeded", ""}},
		{codes.FailedPrecondition, "LAYOUT_MISMATCH", want{500, "server_error", "layout_mismatch", "false"}},
		{codes.Aborted, "LEASE_LOST", want{503, "server_error", "lease_lost", ""}},
		{codes.OutOfRange, "X", want{400, "invalid_request_error", "x", ""}},
		{codes.Unimplemented, "", want{501, "server_error", "", "false"}},
		{codes.Internal, "INTERNAL", want{500, "server_error", "internal", ""}},
		{codes.Unavailable, "NO_WORKERS", want{503, "server_error", "no_workers", ""}},
		{codes.DataLoss, "CORRUPT_BLOCK", want{500, "server_error", "corrupt_block", ""}},
		{codes.Unauthenticated, "", want{401, "invalid_request_error", "invalid_api_key", ""}},
	} {
		w := httptest.NewRecorder()
		Of(context.Background(), failed(one.code, "words", one.reason, nil)).Write(w)
		var body struct {
			Error struct {
				Message, Type string
				Param, Code   *string
			}
		}
		if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
			t.Fatal(err)
		}
		code := ""
		if body.Error.Code != nil {
			code = *body.Error.Code
		}
		got := want{w.Code, body.Error.Type, code, w.Header().Get("X-Should-Retry")}
		if got != one.want {
			t.Errorf("%v %s: %+v, want %+v", one.code, one.reason, got, one.want)
		}
		if one.reason != "" && body.Error.Message != "words" {
			t.Errorf("%s: %q", one.reason, body.Error.Message)
		}
	}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		if _, there := byCode[code]; !there {
			t.Errorf("no row for %v", code)
		}
	}
}

func TestDetails(t *testing.T) {
	s, _ := status.New(codes.ResourceExhausted, "full").WithDetails(
		&errdetails.ErrorInfo{Reason: "OVERLOADED", Domain: "tandem"},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(1500 * time.Millisecond)})
	w := httptest.NewRecorder()
	Of(context.Background(), s.Err()).Write(w)
	if w.Header().Get("Retry-After") != "2" || w.Header().Get("Retry-After-Ms") != "1500" {
		t.Error(w.Header())
	}
	s, _ = status.New(codes.InvalidArgument, "bad").WithDetails(
		&errdetails.ErrorInfo{Reason: "INVALID_REQUEST", Metadata: map[string]string{"field": "x", "code": "context_length_exceeded"}},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "messages[0].role"}}})
	fault := Of(context.Background(), s.Err())
	if fault.Param != "messages[0].role" || fault.Code != "context_length_exceeded" {
		t.Errorf("%+v", fault)
	}
	fault = Of(context.Background(), failed(codes.InvalidArgument, "bad", "INVALID_REQUEST", map[string]string{"field": "top_p"}))
	if fault.Param != "top_p" {
		t.Errorf("%+v", fault)
	}
	if fault = Of(context.Background(), failed(codes.NotFound, "no", "UNKNOWN_MODEL", nil)); fault.Param != "model" {
		t.Errorf("%+v", fault)
	}
}

func TestWhatTheTransportSaysStaysInside(t *testing.T) {
	fault := Of(context.Background(), status.Error(codes.Unavailable, "dial tcp 10.0.0.1:7400: connection refused"))
	if strings.Contains(fault.Message, "10.0.0.1") || !strings.Contains(fault.Detail, "10.0.0.1") || fault.Status != 503 {
		t.Errorf("%+v", fault)
	}
	fault = Of(context.Background(), status.Error(codes.ResourceExhausted, "SERVER: Received message larger than max (5 vs. 4)"))
	if fault.Status != 413 || fault.Code != "request_too_large" {
		t.Errorf("%+v", fault)
	}
	fault = Of(context.Background(), status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)"))
	if fault.Status != 500 {
		t.Errorf("%+v", fault)
	}
}

func TestBodiesAndCauses(t *testing.T) {
	fault := Of(context.Background(), &shape.BodyError{Param: "n", Code: "invalid_type", Message: "words"})
	if string(fault.JSON()) != `{"error":{"message":"words","type":"invalid_request_error","param":"n","code":"invalid_type"}}` {
		t.Error(string(fault.JSON()))
	}
	ctx, end := context.WithCancelCause(context.Background())
	end(&Cause{Draining})
	if fault := Of(ctx, status.Error(codes.Canceled, "context canceled")); fault.Code != "draining" || fault.Status != 503 {
		t.Errorf("%+v", fault)
	}
	if got := string((Fault{Message: "m", Type: "t"}).JSON()); got != `{"error":{"message":"m","type":"t","param":null,"code":null}}` {
		t.Error(got)
	}
}
