//go:build mips || mips64 || ppc64 || s390x

package fastpath

import _ "embed"

//go:embed bpf/fastpath_eb.o
var object []byte
