package fuzzloop

import (
	"encoding/binary"
	"math/rand/v2"
	"reflect"
	"slices"
)

// maxLen is the largest number of bytes that a mutation grows a value to.
const maxLen = 1 << 16

// mutator makes new inputs from a corpus. The same seed makes the same inputs.
type mutator struct {
	corpus  []input
	r       *rand.Rand
	args    []reflect.Value // the last input
	buffers [][]byte        // for its values of bytes and strings
	kept    input           // the last input as it was before the target changed it
}

func newMutator(corpus []input, seed uint64) *mutator {
	return &mutator{corpus: corpus, r: rand.New(rand.NewPCG(seed, 1))}
}

// next sets args to the next input. Values of bytes are valid until it is called again.
func (m *mutator) next(args []reflect.Value) {
	m.args = args
	for len(m.buffers) < len(args) {
		m.buffers = append(m.buffers, nil)
		m.kept = append(m.kept, []byte(nil))
	}
	from := m.corpus[m.r.IntN(len(m.corpus))]
	edits := 1 << m.r.IntN(4)
	for i, v := range from {
		n := 1 + m.r.IntN(edits)
		switch v := v.(type) {
		case []byte:
			m.buffers[i] = append(m.buffers[i][:0], v...)
		case string:
			m.buffers[i] = append(m.buffers[i][:0], v...)
		default:
			args[i].Set(reflect.ValueOf(v))
			if m.r.IntN(3) == 0 {
				m.number(args[i])
			}
			continue
		}
		if len(from) == 1 || m.r.IntN(4) > 0 {
			for range n {
				m.buffers[i] = m.edit(m.buffers[i], i)
			}
		}
		m.kept[i] = append(m.kept[i].([]byte)[:0], m.buffers[i]...)
		if args[i].Kind() == reflect.String {
			args[i].SetString(string(m.buffers[i]))
		} else {
			args[i].SetBytes(m.buffers[i])
		}
	}
}

// current returns the last input, as next made it.
func (m *mutator) current() (in input) {
	for i, a := range m.args {
		switch a.Kind() {
		case reflect.Slice:
			in = append(in, slices.Clone(m.kept[i].([]byte)))
		default:
			in = append(in, a.Interface())
		}
	}
	return in
}

func (m *mutator) number(v reflect.Value) {
	n := m.r.Uint64() >> m.r.IntN(64)
	switch {
	case v.Kind() == reflect.Bool:
		v.SetBool(n&1 != 0)
	case v.CanUint():
		v.SetUint(n)
	case v.CanInt():
		v.SetInt(int64(n))
	}
}

// at returns a position in n bytes: half of the time among the first 64, where headers are.
func (m *mutator) at(n int) int {
	if n > 64 && m.r.IntN(2) == 0 {
		return m.r.IntN(64)
	}
	return m.r.IntN(n)
}

// other returns the same parameter's value of another input.
func (m *mutator) other(parameter int) []byte {
	switch v := m.corpus[m.r.IntN(len(m.corpus))][parameter].(type) {
	case []byte:
		return v
	case string:
		return []byte(v)
	}
	return nil
}

// part returns a part of b, of 32 bytes at most.
func (m *mutator) part(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	from := m.at(len(b))
	return b[from : from+m.r.IntN(min(32, len(b)-from)+1)]
}

// edit mutates b, a parameter's value.
func (m *mutator) edit(b []byte, parameter int) []byte {
	if len(b) == 0 {
		return append(b, m.other(parameter)...)
	}
	i := m.at(len(b))
	switch m.r.IntN(12) {
	case 0, 1:
		b[i] ^= 1 << m.r.IntN(8)
	case 2:
		b[i] = byte(m.r.Uint32())
	case 3:
		b[i] = [...]byte{0, 1, 5, 15, 16, 0x44, 0x45, 0x4f, 0x60, 0x7f, 0x80, 0xff, '"', '{', '0', '9'}[m.r.IntN(16)]
	case 4: // cut short
		return b[:m.r.IntN(len(b))]
	case 5, 6: // a length field that lies
		if i+2 <= len(b) {
			length := [...]int{0, 1, 7, 8, 19, 20, 40, len(b), len(b) - i, len(b) - i + 2, 0x7fff, 0xffff}[m.r.IntN(12)]
			binary.BigEndian.PutUint16(b[i:], uint16(length+m.r.IntN(3)-1))
		}
	case 7: // the start of this and the end of another
		if o := m.other(parameter); len(o) > 0 {
			return append(b[:i], o[m.at(len(o)):]...)
		}
	case 8: // a part of another over this
		copy(b[i:], m.part(m.other(parameter)))
	case 9: // without a part
		return slices.Delete(b, i, i+m.r.IntN(min(32, len(b)-i)+1))
	case 10: // with a part of itself or another twice
		p := m.part(b)
		if m.r.IntN(2) == 0 {
			p = m.part(m.other(parameter))
		}
		if len(b)+len(p) <= maxLen {
			return slices.Insert(b, i, slices.Clone(p)...)
		}
	case 11: // another number of 32 bits
		if i+4 <= len(b) {
			binary.BigEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:])+m.r.Uint32N(65)-32)
		}
	}
	return b
}
