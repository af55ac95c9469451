package report_test

import (
	"encoding/base64"
	"strings"
	"testing"

	"culvert/internal/report"
)

// Secrets are removed in every encoding; similar text stays.
func TestRedactor(t *testing.T) {
	const secret = `p&ss "w0rd"/+`
	pem := "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
	for name, c := range map[string]struct{ text, want string }{
		"as it is":          {"x " + secret + " y", "x [removed] y"},
		"in a URL":          {"a=p%26ss+%22w0rd%22%2F%2B", "a=[removed]"},
		"in JSON":           {`{"a":"p&ss \"w0rd\"/+"}`, `{"a":"[removed]"}`},
		"a certificate":     {"a\n" + pem + "\nb", "a\n[removed]\nb"},
		"one in base64":     {"ca: " + base64.StdEncoding.EncodeToString([]byte(pem)), "ca: [removed]"},
		"a cut one":         {"-----BEGIN RSA PRIVATE KEY-----\nMIIB", "[removed]"},
		"a variable":        {"CULVERT_ETCD_PASSWORD=abc def", "CULVERT_ETCD_PASSWORD=[removed] def"},
		"in JSON, by name":  {`{"token": "abc", "b": 1}`, `{"token": "[removed]", "b": 1}`},
		"a flag":            {"run --etcd-password abc --x", "run --etcd-password [removed] --x"},
		"in an endpoint":    {"https://me:abc@192.0.2.1:2379/x", "https://[removed]@192.0.2.1:2379/x"},
		"a header":          {"Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer [removed]"},
		"in YAML":           {"client-key-data: QUJD\nname: x", "client-key-data: [removed]\nname: x"},
		"a file's name":     {"--etcd-password-file /etc/p --etcd-keyfile /etc/k", "--etcd-password-file /etc/p --etcd-keyfile /etc/k"},
		"a path by name":    {"TOKEN=/var/run/token", "TOKEN=/var/run/token"},
		"a word":            {"the password was refused", "the password was refused"},
		"a rule":            {"tcp dport 22 accept # handle 7", "tcp dport 22 accept # handle 7"},
		"what was replaced": {"PASSWORD=[removed]", "PASSWORD=[removed]"},
	} {
		if got := string(report.NewRedactor(secret).Clean([]byte(c.text))); got != c.want {
			t.Errorf("%s: %q became %q", name, c.text, got)
		}
	}
	for offset := range 7 {
		text := strings.Repeat("u", offset) + ":" + secret + ":rest"
		code := base64.StdEncoding.EncodeToString([]byte(text))
		got := string(report.NewRedactor(secret).Clean([]byte(code)))
		if back, _ := base64.StdEncoding.DecodeString(got); !strings.Contains(got, "[removed]") || strings.Contains(string(back), "w0rd") {
			t.Errorf("base64 at offset %d: %s", offset, got)
		}
	}
}
