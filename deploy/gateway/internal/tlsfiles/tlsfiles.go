// Package tlsfiles keeps certificates that are read from files current: what has changed is used for
// the next handshake, without a restart.
package tlsfiles

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// lookEvery is how often files are looked at, at most.
const lookEvery = time.Second

// watched is something made from files, and made again when they have changed.
type watched[T any] struct {
	paths []string
	make  func() (T, error)

	mu     sync.Mutex
	value  T
	stamps []time.Time
	looked time.Time
}

func watch[T any](paths []string, make func() (T, error)) (*watched[T], error) {
	w := &watched[T]{paths: paths, make: make}
	var err error
	w.stamps = w.modified()
	w.looked = time.Now()
	w.value, err = make()
	return w, err
}

func (w *watched[T]) modified() []time.Time {
	times := make([]time.Time, len(w.paths))
	for i, path := range w.paths {
		if info, err := os.Stat(path); err == nil {
			times[i] = info.ModTime()
		}
	}
	return times
}

// get is the newest that could be made: while files are half written the old one serves.
func (w *watched[T]) get() T {
	w.mu.Lock()
	defer w.mu.Unlock()
	if time.Since(w.looked) < lookEvery {
		return w.value
	}
	w.looked = time.Now()
	stamps := w.modified()
	if equal(stamps, w.stamps) {
		return w.value
	}
	fresh, err := w.make()
	if err != nil {
		slog.Error("a certificate that has changed can't be used; the old one stays", "error", err)
		return w.value
	}
	slog.Info("a certificate has changed and is used from now on", "files", w.paths)
	w.value, w.stamps = fresh, stamps
	return w.value
}

func equal(a, b []time.Time) bool {
	for i := range a {
		if !a[i].Equal(b[i]) {
			return false
		}
	}
	return true
}

func pair(certificate, key string) (*watched[*tls.Certificate], error) {
	return watch([]string{certificate, key}, func() (*tls.Certificate, error) {
		loaded, err := tls.LoadX509KeyPair(certificate, key)
		if err != nil {
			return nil, fmt.Errorf("%s, %s: %w", certificate, key, err)
		}
		return &loaded, nil
	})
}

func pool(file string) (*watched[*x509.CertPool], error) {
	return watch([]string{file}, func() (*x509.CertPool, error) {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		made := x509.NewCertPool()
		if !made.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s has no certificate in PEM", file)
		}
		return made, nil
	})
}

// Server is what a listener shows and asks for. Without `clientCA` clients need no certificate.
func Server(certificate, key, clientCA string) (*tls.Config, error) {
	own, err := pair(certificate, key)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return own.get(), nil
		},
	}
	if clientCA == "" {
		return config, nil
	}
	authorities, err := pool(clientCA)
	if err != nil {
		return nil, err
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		current := config.Clone()
		current.ClientCAs = authorities.get()
		return current, nil
	}
	return config, nil
}

// Client is how this process meets servers: they are held to `ca`; `certificate` and `key` are shown
// if they are not empty.
func Client(ca, certificate, key string) (*tls.Config, error) {
	authorities, err := pool(ca)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The library's own check would keep to the authorities of the start; the one below is the
		// same with those of now.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			return verify(state, authorities.get())
		},
	}
	if certificate == "" {
		return config, nil
	}
	own, err := pair(certificate, key)
	if err != nil {
		return nil, err
	}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return own.get(), nil
	}
	return config, nil
}

func verify(state tls.ConnectionState, roots *x509.CertPool) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the server showed no certificate")
	}
	between := x509.NewCertPool()
	for _, certificate := range state.PeerCertificates[1:] {
		between.AddCert(certificate)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: between,
		DNSName:       state.ServerName,
	})
	return err
}
