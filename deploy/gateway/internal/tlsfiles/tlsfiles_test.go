package tlsfiles

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority is one that certificates are made by.
type authority struct {
	t      *testing.T
	folder string
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, folder: t.TempDir()}
	a.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	form := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, form, form, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, _ = x509.ParseCertificate(der)
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) file(name string) string { return filepath.Join(a.folder, name) }

func (a *authority) write(name, kind string, der []byte) {
	if err := os.WriteFile(a.file(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// issue writes name.pem and name.key, and returns the serial number.
func (a *authority) issue(name string, until time.Time) int64 {
	a.serial++
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	form := &x509.Certificate{
		SerialNumber: big.NewInt(100 + a.serial), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, form, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	private, _ := x509.MarshalECPrivateKey(key)
	a.write(name+".pem", "CERTIFICATE", der)
	a.write(name+".key", "EC PRIVATE KEY", private)
	return 100 + a.serial
}

// meet has both sides shake hands and exchange a byte; it returns the server's serial number.
func meet(server, client *tls.Config) (int64, error) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	go func() {
		s := tls.Server(there, server)
		if s.Handshake() == nil {
			_, _ = s.Write([]byte("x"))
		}
		there.Close()
	}()
	client = client.Clone()
	client.ServerName = "localhost"
	c := tls.Client(here, client)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return 0, err
	}
	return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64(), nil
}

func must[T any](t *testing.T, value T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func TestMutual(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	later := time.Now().Add(time.Hour)
	serial := a.issue("server", later)
	a.issue("client", later)
	a.issue("old", time.Now().Add(-time.Minute))
	other.issue("stranger", later)
	serverConfig, err := Server(a.file("server.pem"), a.file("server.key"), a.file("ca.pem"))
	server := must(t, serverConfig, err)
	clientConfig, err := Client(a.file("ca.pem"), a.file("client.pem"), a.file("client.key"))
	if got, err := meet(server, must(t, clientConfig, err)); err != nil || got != serial {
		t.Error(got, err)
	}
	for name, from := range map[string]*authority{"": a, "old": a, "stranger": other} {
		certificate, key := "", ""
		if name != "" {
			certificate, key = from.file(name+".pem"), from.file(name+".key")
		}
		config, err := Client(a.file("ca.pem"), certificate, key)
		if _, err := meet(server, must(t, config, err)); err == nil {
			t.Errorf("%q was let in", name)
		}
	}
	distrustful, err := Client(other.file("ca.pem"), a.file("client.pem"), a.file("client.key"))
	if _, err := meet(server, must(t, distrustful, err)); err == nil {
		t.Error("a server of another authority was believed")
	}
}

func TestAChangedCertificateIsUsed(t *testing.T) {
	a := newAuthority(t)
	later := time.Now().Add(time.Hour)
	first := a.issue("server", later)
	own, err := pair(a.file("server.pem"), a.file("server.key"))
	current := must(t, own, err)
	serial := func() int64 {
		current.looked = time.Time{} // as if the time to look had come
		leaf, _ := x509.ParseCertificate(current.get().Certificate[0])
		return leaf.SerialNumber.Int64()
	}
	if serial() != first {
		t.Fatal("not the first")
	}
	// Half written: the old one stays.
	touched := time.Now().Add(2 * time.Second)
	if err := os.WriteFile(a.file("server.pem"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = os.Chtimes(a.file("server.pem"), touched, touched)
	if serial() != first {
		t.Fatal("a broken file was used")
	}
	second := a.issue("server", later)
	touched = touched.Add(2 * time.Second)
	_ = os.Chtimes(a.file("server.pem"), touched, touched)
	if serial() != second {
		t.Fatal("the new one was not used")
	}
}

func TestFilesThatAreNone(t *testing.T) {
	a := newAuthority(t)
	if _, err := Server(a.file("no.pem"), a.file("no.key"), ""); err == nil {
		t.Error("no certificate, no error")
	}
	a.write("empty.pem", "NOTHING", nil)
	if _, err := Client(a.file("empty.pem"), "", ""); err == nil {
		t.Error("no authorities, no error")
	}
}
