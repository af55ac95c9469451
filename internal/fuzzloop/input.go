package fuzzloop

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// header is the first line of a file with an input, as Go's fuzzer writes it. One line for
// each value follows, a Go expression such as []byte("GET") or uint16(7).
const header = "go test fuzz v1"

func parse(text []byte, target reflect.Type) (input, error) {
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	if strings.TrimSpace(lines[0]) != header || len(lines) != target.NumIn() {
		return nil, fmt.Errorf("no input for a target of %d parameters", target.NumIn()-1)
	}
	var in input
	for i, line := range lines[1:] {
		v := reflect.New(target.In(i + 1)).Elem()
		if err := parseValue(line, v); err != nil {
			return nil, fmt.Errorf("%s: %w", line, err)
		}
		in = append(in, v.Interface())
	}
	return in, nil
}

func parseValue(line string, v reflect.Value) error {
	expr, err := parser.ParseExpr(line)
	if err != nil {
		return err
	}
	call, ok := expr.(*ast.CallExpr)
	if !ok || len(call.Args) != 1 {
		return errors.New("not a conversion")
	}
	sign, arg := "", call.Args[0]
	if u, ok := arg.(*ast.UnaryExpr); ok {
		sign, arg = u.Op.String(), u.X
	}
	var value string
	switch a := arg.(type) {
	case *ast.BasicLit:
		value = sign + a.Value
	case *ast.Ident: // true or false
		value = a.Name
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(value == "true")
		return nil
	case reflect.String, reflect.Slice:
		s, err := strconv.Unquote(value)
		if v.Kind() == reflect.String {
			v.SetString(s)
		} else {
			v.SetBytes([]byte(s))
		}
		return err
	}
	if strings.HasPrefix(value, "'") {
		r, _, _, err := strconv.UnquoteChar(value[1:], '\'')
		if err != nil {
			return err
		}
		value = strconv.Itoa(int(r))
	}
	if v.CanUint() {
		n, err := strconv.ParseUint(value, 0, 64)
		v.SetUint(n)
		return err
	}
	n, err := strconv.ParseInt(value, 0, 64)
	v.SetInt(n)
	return err
}

// save writes an input to testdata, where go test runs it, and returns the file's name.
func save(name string, in input) (string, error) {
	var text strings.Builder
	text.WriteString(header + "\n")
	for _, v := range in {
		switch v := v.(type) {
		case []byte, string:
			fmt.Fprintf(&text, "%T(%q)\n", v, v)
		default:
			fmt.Fprintf(&text, "%T(%v)\n", v, v)
		}
	}
	dir := filepath.Join("testdata", "fuzz", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(text.String()))
	file := filepath.Join(dir, fmt.Sprintf("%x", sum[:8]))
	return file, os.WriteFile(file, []byte(strings.ReplaceAll(text.String(), "[]uint8(", "[]byte(")), 0o644)
}

func (in input) size() (sum int) {
	for _, v := range in {
		switch v := v.(type) {
		case []byte:
			sum += len(v)
		case string:
			sum += len(v)
		}
	}
	return sum
}

// set sets v to a copy of a value.
func set(v reflect.Value, value any) {
	if b, ok := value.([]byte); ok {
		v.SetBytes(slices.Clone(b))
		return
	}
	v.Set(reflect.ValueOf(value))
}
