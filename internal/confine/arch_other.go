//go:build !amd64 && !arm64

package confine

const auditArch = 0

var deniedHere []uint32
