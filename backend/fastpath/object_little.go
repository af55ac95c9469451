//go:build 386 || amd64 || arm || arm64 || loong64 || mipsle || mips64le || ppc64le || riscv64

package fastpath

import _ "embed"

//go:embed bpf/fastpath_el.o
var object []byte
