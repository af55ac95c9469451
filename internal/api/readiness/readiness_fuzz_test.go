package readiness

import (
	"encoding/json"
	"testing"

	"culvert/internal/fuzzloop"
)

// FuzzAnswer parses arbitrary answers: one is ready only if it says so.
func FuzzAnswer(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add([]byte("HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{\"ready\":true}\n"))
	f.Add([]byte("HTTP/1.0 404 Not Found\r\n\r\nnothing"))
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n{\"code\":\"fenced\",\"reason\":\"x\"}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		a, err := parse(text)
		if err != nil {
			if a != (Answer{}) {
				t.Errorf("an error and %+v", a)
			}
			return
		}
		b, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(append([]byte("HTTP/1.0 200 OK\r\n\r\n"), b...))
		if err != nil || again.Ready != a.Ready {
			t.Errorf("%+v became %+v, %v", a, again, err)
		}
	})
}
